"""What recall brings back of facts in a document that a first question is not about, and later ones are."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from pyramidserve.types import Compression
from workers.bench.facts import Asking, talks
from workers.bench.intervals import LEAST_GAIN, share
from workers.engine.engine import Engine, EngineConfig


def main() -> None:
    """Prints a table and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--talks", type=int, default=80, metavar="N")
    parser.add_argument("--tokens", type=int, default=1200, metavar="N", help="of a document")
    parser.add_argument("--kv-keep", type=float, default=0.45)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engine = Engine(
        EngineConfig(dtype=arguments.dtype, kv_bytes=1 << 30, host_bytes=1 << 30, max_sequences=1)
    )
    asking = Asking(engine)
    modes = {
        f"{prefill} {recall}": Compression("pyramid", prefill, arguments.kv_keep, recall=recall)
        for prefill, recall in itertools.product(("evict", "prune"), ("off", "turn"))
    }
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in ("no document", "full", *modes)}
    held = talks(engine.tokenizer, arguments.tokens, arguments.talks, arguments.seed)
    bare, said = asking.begin("")
    for number, talk in enumerate(held, 1):
        turns = asking.turns(talk.asked)
        results["no document"] += asking.ask(bare, said, turns, Compression())
        ids, reply = asking.begin(talk.document)
        for mode, compression in {"full": Compression(), **modes}.items():
            results[mode] += asking.ask(ids, reply, turns, compression)
        print(f"\r{number} of {len(held)} talks", end="", flush=True)
    print()
    report(results)
    if arguments.output:
        columns = {
            mode: {name: [each[name] for each in own] for name in own[0]} for mode, own in results.items()
        }
        arguments.output.write_text(json.dumps(columns) + "\n")


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints how far each mode closes the gap to ``full``, where the document helps with the answer."""
    scores = {mode: [each["log_probability"] for each in own] for mode, own in results.items()}
    pairs = zip(scores["full"], scores["no document"], strict=True)
    counted = [i for i, (full, without) in enumerate(pairs) if full - without >= LEAST_GAIN]
    print(f"{len(counted)} of {len(scores['full'])} questions are counted")
    for mode, own in results.items():
        kept = [own[i] for i in counted]
        mean = {name: sum(each[name] for each in kept) / len(kept) for name in kept[0]}
        line = (
            f"{mode:12} log-probability {mean['log_probability']:+.3f}, exact {mean['exact']:.1%}, "
            f"KV on the device {mean['device_share']:.2f}, reused {mean['reused']:.1%}, "
            f"{mean['recalled_bytes'] / 2**20:.1f} MiB recalled a turn"
        )
        if mode.endswith("turn"):
            off = scores[mode.replace("turn", "off")]
            closed = share([(scores[mode][i] - off[i], scores["full"][i] - off[i]) for i in counted])
            line += f"; recovers {closed.value:.1%} of the gap [{closed.low:.1%}, {closed.high:.1%}]"
        print(line)


if __name__ == "__main__":
    main()
