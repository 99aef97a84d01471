// The turns of a conversation as they are read. Whatever is said gets here as text alone.

const NEAR = 60; // pixels from the end, within which a reader follows what comes

export class Turn {
  #log;
  #reply;

  /** A turn at the end of `log` that begins with what the user says. */
  constructor(log, said) {
    this.#log = log;
    this.#reply = element("p", "assistant coming");
    log.append(element("p", "user", said), this.#reply);
    log.scrollTop = log.scrollHeight;
  }

  get begun() {
    return this.#reply.textContent !== "";
  }

  hear(piece) {
    this.#grow(() => this.#reply.append(piece));
  }

  /** The reply has ended; `note` says why, where that is not its own end. */
  end(note = "", kind = "note") {
    this.#reply.classList.remove("coming");
    this.#grow(() => {
      if (note) this.#reply.after(element("p", kind, note));
      if (!this.begun) this.#reply.remove();
    });
  }

  #grow(change) {
    const log = this.#log;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    change();
    if (follows) log.scrollTop = log.scrollHeight;
  }
}

/** Adds what is not of the conversation: of kind "note" or "problem". */
export function say(log, text, kind) {
  log.append(element("p", kind, text));
}

function element(name, classes, text = "") {
  const made = document.createElement(name);
  made.className = classes;
  made.textContent = text;
  return made;
}
