// What has been said, and the session that has its KV.

import { events } from "./events.js";
import { call, Refused } from "./server.js";

export class Conversation {
  // Named here, so that it can be ended even where no reply came to its end.
  #session = `page-${newName()}`;
  #messages = [];
  #running = null;

  /**
   * The receipt of the reply to `text`. Throws as `call` does.
   *
   * Its pieces go to `heard` as they come, and to `held` what is on the device meanwhile.
   */
  async say(text, asked, heard, held) {
    const messages = [...this.#messages, { role: "user", content: text }];
    let reply = "";
    let receipt = null;
    this.#running = new AbortController();
    try {
      const answer = await call("POST", "v1/chat/completions", {
        signal: this.#running.signal,
        body: {
          ...asked,
          messages,
          session_id: this.#session,
          stream: true,
          stream_options: { include_usage: true, continuous_kv_tokens: true },
        },
      });
      for await (const chunk of events(answer.body)) {
        if (chunk.error) throw new Refused(chunk.error.message);
        const choice = chunk.choices[0];
        const piece = choice?.delta.content;
        if (piece) {
          reply += piece;
          heard(piece);
        }
        if (choice?.kv_tokens) held(choice.kv_tokens);
        receipt ??= chunk.pyramidserve;
      }
      return receipt;
    } finally {
      this.#running = null;
      // What was said in part counts as said; what nothing came of may be said again.
      if (reply || receipt) this.#messages = [...messages, { role: "assistant", content: reply }];
    }
  }

  /** Ends the reply that is coming, if there is one. */
  stop() {
    this.#running?.abort();
  }

  /** Frees what the server holds of it. Throws as `call` does. */
  async end() {
    this.stop();
    try {
      await call("DELETE", `v1/sessions/${this.#session}`);
    } catch (error) {
      // It has never heard of it, or has forgotten it.
      if (error.status !== 404) throw error;
    }
  }
}

function newName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}
