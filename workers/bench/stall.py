"""How long streams that run are held up by a long prompt that comes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from workers.engine.engine import Engine, EngineRequest
from workers.engine.loop import SequenceTokens
from workers.percentile import percentile

# Tokens of each stream from which it is known how fast they come undisturbed.
QUIET_TOKENS = 64


@dataclass(frozen=True)
class Stall:
    """Seconds between the tokens of streams, before a long prompt comes and until its first token."""

    quiet_p50: float
    busy_p50: float
    busy_p99: float
    late_ttft: float


def measure_stall(engine: Engine, streams: Sequence[EngineRequest], late: EngineRequest) -> Stall:
    """Starts ``streams`` on an idle engine, then ``late``; ends them all."""
    times: dict[int, list[float]] = {engine.submit(request)[0]: [] for request in streams}

    def run(until: Callable[[], bool]) -> None:
        while not until():
            events = engine.step()
            now = time.perf_counter()
            for event in events:
                if isinstance(event, SequenceTokens):
                    times[event.sequence].append(now)

    run(lambda: min(map(len, times.values())) > QUIET_TOKENS)
    quiet = [after - before for each in times.values() for before, after in pairwise(each[-QUIET_TOKENS:])]
    begun = {number: len(each) for number, each in times.items()}
    number, _ = engine.submit(late)
    began, times[number] = time.perf_counter(), []
    run(lambda: bool(times[number]))
    busy = [
        after - before
        for stream, count in begun.items()
        for before, after in pairwise(times[stream][count - 1 :])
    ]
    for each in times:
        engine.cancel(each)
    run(lambda: engine.idle)
    return Stall(median(quiet), median(busy), percentile(busy, 99), times[number][0] - began)
