// The server that this page is of.

const TOKEN = "pyramidserve.token";

/** What the server says against a call. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** No answer, or none to its end. */
export class Unreachable extends Error {}

/** Calls are made with `token` from now on, until the tab is closed. */
export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** The answer to a call, its body still to be read. Throws Refused, Unreachable, or that it was aborted. */
export async function call(method, path, { body, signal } = {}) {
  const headers = new Headers();
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  if (body) headers.set("Content-Type", "application/json");
  const asked = { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) };
  const answer = await reached(fetch(path, asked), "the server is not reachable");
  if (answer.ok) return answer;
  throw new Refused(await saidAgainst(answer), answer.status);
}

/** What comes of a network's `promise`; throws Unreachable with `otherwise` where it breaks. */
export async function reached(promise, otherwise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable(otherwise);
  }
}

async function saidAgainst(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    // A proxy's own page, say.
    return `the server answers ${answer.status} ${answer.statusText}`;
  }
}
