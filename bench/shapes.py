"""What `prune` loses where a prompt's tokens go otherwise into the layers, at the same number in all."""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pyramidserve.types import Compression
from workers.bench.cell import BASELINE, Cell, Holding
from workers.bench.facts import Asking, talks
from workers.bench.parts.facts import Facts
from workers.bench.parts.part import Part, Record
from workers.bench.parts.passages import Passages, text_passages
from workers.bench.summary import summary
from workers.budget.kv_share import KVShare
from workers.engine.engine import Engine, EngineConfig
from workers.model.checkpoint import EMBEDDED

SEED, FULL = 1, "full"
SIXTEEN_BITS = KVShare(1.0)
# Whose scores choose: the mean over the recent window's rows, or the worst case, pooled.
SCORES = ("pyramid", "defensive")


def shapes(layers: int, keep: float) -> dict[str, list[float]]:
    """Of each shape the share of a prompt that goes into each layer; every mean is ``keep``."""
    return {
        "even": _steps(layers, keep, []),
        "first layer whole": _steps(layers, keep, [(1, 1.0)]),
        "fifth whole": _steps(layers, keep, [(layers // 5, 1.0)]),
        "third whole": _steps(layers, keep, [(layers // 3, 1.0)]),
        "two steps": _steps(layers, keep, [(1, 1.0), (layers // 3, keep + 0.2)]),
        "late two steps": _steps(layers, keep, [(layers // 5, 1.0), (layers // 3, keep)]),
    }


def _steps(layers: int, keep: float, steps: Iterable[tuple[int, float]]) -> list[float]:
    """So many layers with such a share, one step behind the other, and the rest evenly."""
    own = [share for count, share in steps for _ in range(count)]
    left = keep * layers - sum(own)
    return own + [left / (layers - len(own))] * (layers - len(own))


@dataclass(frozen=True)
class Shaped(Holding):
    """A cell whose layers keep such shares of a prompt."""

    shares_of_layers: tuple[float, ...] = ()

    def asks(self, prompt_tokens: int) -> Compression:
        counts = tuple(max(1, round(share * prompt_tokens)) for share in self.shares_of_layers)
        return Compression(self.cell.compression.policy, "prune", parameters={"tokens": counts})


def main() -> None:
    """Prints a table and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    parser.add_argument("--kv-keep", type=float, default=0.45)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=24, metavar="N", help="of each length")
    parser.add_argument(
        "--talks", type=int, default=12, metavar="N", help="with facts that are asked for later"
    )
    parser.add_argument("--document", type=int, default=1200, metavar="TOKENS", help="of each talk")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool = 1 << 30
    engine = Engine(
        EngineConfig(
            arguments.model, dtype=arguments.dtype, kv_bytes=pool, host_bytes=pool, max_sequences=4
        )
    )
    asking, tokenizer = Asking(engine), engine.tokenizer
    parts: dict[str, Part] = {
        "loss": Passages(text_passages(tokenizer, arguments.prompts, 128, arguments.texts)),
        "facts": Facts(talks(tokenizer, arguments.document, arguments.talks, SEED), arguments.document),
    }
    for each in parts.values():
        each.begin(asking)
    holdings: dict[str, Holding] = {FULL: Holding(BASELINE, SIXTEEN_BITS)} | {
        f"{policy}, {name}": Shaped(Cell(Compression(policy, "prune")), SIXTEEN_BITS, tuple(shares))
        for policy in SCORES
        for name, shares in shapes(engine.model.layers, arguments.kv_keep).items()
    }
    for policy in SCORES:
        usual = Cell(Compression(policy, "prune"), share=arguments.kv_keep)
        holdings[f"{policy}, as it is"] = Holding(usual, SIXTEEN_BITS)
    found: dict[str, Record] = {}
    for name, holding in holdings.items():
        own: Record = {}
        seconds = {}
        for part, each in parts.items():
            began = time.perf_counter()
            own[part] = each.measure(asking, holding, found[FULL][part] if found else None, lambda _: None)
            seconds[part] = time.perf_counter() - began
        found[name] = own
        told = own["told"] = summary(own, found[FULL], 1.0)
        told["seconds"] = seconds["loss"]
        losses = [f"{told[f'worse_{tokens}']:+.2%} behind {tokens}" for tokens in arguments.prompts]
        print(
            f"{name:30} {told[f'kept_{arguments.prompts[0]}']:.3f} of the KV, {', '.join(losses)}, "
            f"facts {told.get('facts_kept', float('nan')):.0%}, "
            f"read in {told['seconds'] / found[FULL]['told']['seconds']:.2f} of full's time",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
