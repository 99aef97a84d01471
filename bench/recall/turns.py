"""How soon the turns of a long session begin, beside computing their whole history anew."""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from pyramidserve.types import ChatMessage, Compression, Stopping
from workers.bench.texts import windows
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.model.checkpoint import EMBEDDED

MODES = {
    "full": Compression(),
    "evict off": Compression("pyramid", "evict", 0.45),
    "evict turn": Compression("pyramid", "evict", 0.45, recall="turn"),
    "evict step": Compression("pyramid", "evict", 0.45, recall="step"),
    "evict exact": Compression("pyramid", "evict", 0.45, recall="exact"),
    "prune off": Compression("pyramid", "prune", 0.45),
    "prune turn": Compression("pyramid", "prune", 0.45, recall="turn"),
}
QUESTIONS = ["Go on.", "What else?", "Explain the first point.", "Give an example.", "Sum it up."]


def first_token(engine: Engine, request: EngineRequest) -> tuple[float, str, Any]:
    """Seconds to the first token, the reply's text, and its receipt."""
    began, seconds, text = time.perf_counter(), 0.0, ""
    engine.submit(request)
    while True:
        for event in engine.step():
            if isinstance(event, SequenceTokens):
                seconds = seconds or time.perf_counter() - began
                text += event.tokens.text
            elif isinstance(event, SequenceFinished):
                return seconds, text, event.receipt


def main() -> None:
    """Prints a table and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    parser.add_argument("--tokens", type=int, default=3000, metavar="N", help="of the session's first turn")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="of a session")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engine = Engine(EngineConfig(arguments.model, kv_bytes=1 << 30, host_bytes=1 << 30, max_sequences=1))
    stopping = Stopping(max_tokens=24, ignore_eos=True)
    results = []
    for mode, compression in MODES.items():
        shares: list[list[float]] = [[] for _ in range(arguments.turns)]
        spilled = recalled = 0
        for text in windows(engine.tokenizer, arguments.tokens, arguments.runs):
            history = [ChatMessage("user", engine.tokenizer.decode(text) + "\n\n" + QUESTIONS[0])]
            for turn in range(arguments.turns):
                anew, *_ = first_token(
                    engine, EngineRequest(history, stopping=stopping, compression=compression)
                )
                request = EngineRequest(history, stopping=stopping, compression=compression, session_id="s")
                seconds, reply, receipt = first_token(engine, request)
                shares[turn].append(seconds / anew)
                spilled += receipt.spilled_bytes
                recalled += receipt.recalled_bytes
                question = QUESTIONS[(turn + 1) % len(QUESTIONS)]
                history += [ChatMessage("assistant", reply), ChatMessage("user", question)]
            engine.end_session("s")
        medians = [median(each) for each in shares]
        per_token = spilled / arguments.runs / arguments.tokens
        results.append({"mode": mode, "shares": shares, "spilled_per_token": per_token})
        print(
            f"{mode:12} time to the first token over that of the whole history, turn by turn: "
            + " ".join(f"{each:.3f}" for each in medians)
            + f"; {per_token / 1e3:.1f} kB spilled for each token of the session",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
