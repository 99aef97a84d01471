"""What holding output to a JSON schema costs a decode step, in pairs: all requests are held, or none is."""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from pyramidserve.types import Compression, Constraint
from workers.bench.measure import TurnLog, measure, warm_up
from workers.bench.workload import WORKLOADS, named_workload, requests
from workers.engine.engine import Engine, EngineConfig
from workers.engine.pipeline import connect_local
from workers.model.grammar import Matching

THREADS = 2
# Replies to it are longer than any workload's.
LONG = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"type": "string"}}},
    "minItems": 999,
}
HELD = Constraint("json_schema", json.dumps(LONG))


@dataclass(frozen=True)
class Pair:
    """Seconds of the median decode step, free and held; and of a step, those that masks took."""

    free: float
    held: float
    masks: float


class Timed:
    """Sums up what ``Matching.allowed`` takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        allowed = Matching.allowed

        def timed(matching: Matching, output_ids: list[int]) -> object:
            began = time.perf_counter()
            try:
                return allowed(matching, output_ids)
            finally:
                self.seconds += time.perf_counter() - began

        Matching.allowed = timed  # type: ignore[assignment, method-assign]


def measure_pairs(model: str, workload: str, pairs: int) -> list[Pair]:
    """Runs the workload so many times each way, first one and then the other first."""
    log, sizes, timed = TurnLog(), named_workload(workload), Timed()
    config = EngineConfig(model, kv_bytes=256 << 20, max_sequences=max(8, sizes.requests))
    engine = Engine(config, lambda configs: connect_local(configs, on_advance=log))
    free = requests(sizes, engine.tokenizer, Compression("full"))
    held = [replace(request, constraint=HELD) for request in free]
    warm_up(engine, log, held)
    measured = []
    for number in range(pairs):
        steps: dict[bool, float] = {}
        for holds in (True, False) if number % 2 else (False, True):
            timed.seconds = 0.0
            run = measure(engine, log, held if holds else free)
            steps[holds] = run.decode_step_p50
            if holds:
                # Of prefills too, each of which draws one token as a step does.
                masks = timed.seconds / (sizes.output or 1)
        measured.append(Pair(steps[False], steps[True], masks))
    return measured


def main() -> None:
    """Prints the medians and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workload", default="W2", help=f"{', '.join(WORKLOADS)}, or sizes like 8x1024+64; default: W2"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    pairs = measure_pairs(arguments.model, arguments.workload, arguments.pairs)
    slower = sorted(pair.held / pair.free - 1 for pair in pairs)
    free, masks = (median(each) for each in zip(*((pair.free, pair.masks) for pair in pairs), strict=True))
    print(
        f"{arguments.workload}: a decode step takes {free * 1e3:.1f} ms, and {median(slower):.1%} more "
        f"({slower[0]:.1%} to {slower[-1]:.1%} in {len(pairs)} pairs) where all output is held to one; "
        f"masks are {masks * 1e3:.2f} ms of it, {masks / free:.1%} of a free step"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps([vars(pair) for pair in pairs]))


if __name__ == "__main__":
    main()
