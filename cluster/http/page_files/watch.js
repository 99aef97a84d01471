// Asks the server for the cluster's state every second, while anybody looks.

import { call, reached } from "./server.js";

const EVERY = 1000; // milliseconds
const PATIENCE = 5000;

export class Watch {
  #told;
  #failed;
  #timer = 0;
  #asking = false;

  /** States go to `told`, and what goes wrong to `failed`. */
  constructor(told, failed) {
    this.#told = told;
    this.#failed = failed;
    document.addEventListener("visibilitychange", () => this.ask());
  }

  /** Asks now, and again and again; not where a token is wanted first. */
  async ask() {
    if (this.#asking || document.hidden) return;
    clearTimeout(this.#timer);
    this.#asking = true;
    let again = true;
    try {
      const answer = await call("GET", "v1/cluster", { signal: AbortSignal.timeout(PATIENCE) });
      this.#told(await reached(answer.json(), "the server is not reachable"));
    } catch (error) {
      again = error.status !== 401;
      this.#failed(error);
    } finally {
      this.#asking = false;
    }
    if (again) this.#timer = setTimeout(() => this.ask(), EVERY);
  }
}
