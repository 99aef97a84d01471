// Server-sent events whose data is JSON.

import { reached, Unreachable } from "./server.js";

const BROKEN = "the connection broke before the reply had ended";
const DONE = "[DONE]";

/** The data of each event of a body, up to the last. Throws Unreachable where the last does not come. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reached(reader.read(), BROKEN);
    if (done) throw new Unreachable(BROKEN);
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = dataOf(event);
      if (data === DONE) return;
      if (data) yield JSON.parse(data);
    }
  }
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice("data:".length).trimStart()).join("\n");
}
