"""One run of a workload, with everything that is to be known of it."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from workers.engine.engine import Engine, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.engine.pipeline import LocalPipeline
from workers.engine.sequence import percentile99
from workers.engine.stage import Stage
from workers.engine.step import StepKind

# What a shard's stopwatch tells of; the rest of a step is Python's.
MEASURED = ("gemm", "attention", "selection", "elementwise")


@dataclass(frozen=True)
class Run:
    """One run of a workload; times in seconds, memory in bytes.

    Attributes:
        turns: how many decode steps, releases, and blocks of prefills there were.
        shares: of the turns' time, by what it went to: MEASURED, and "python" for the rest.
        kv_bytes_mean: over time.
        kv_keep_reached: the least fraction of a prompt's KV that was kept.
    """

    wall_seconds: float
    output_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    turns: dict[str, int]
    shares: dict[str, float]
    decode_step_p50: float
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float
    inter_token_p99: float
    kv_bytes_peak: int
    kv_bytes_mean: int
    spilled_bytes: int
    kv_keep_reached: float


class TimedPipeline(LocalPipeline):
    """A local pipeline that notes how long each step, or block of a prefill, took."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.turns: dict[StepKind, list[float]] = {kind: [] for kind in StepKind}
        super().__init__(stages, lambda kind, seconds: self.turns[kind].append(seconds))


def measure(engine: Engine, pipeline: TimedPipeline, requests: Sequence[EngineRequest]) -> Run:
    """Runs ``requests`` together on an idle engine; ``pipeline`` is the engine's."""
    for turns in pipeline.turns.values():
        turns.clear()
    before = _spent(engine.stages)
    began = last = time.perf_counter()
    token_times: dict[int, list[float]] = {engine.submit(request)[0]: [] for request in requests}
    receipts, kv_seconds, kv_peak = [], 0.0, 0
    while not engine.idle:
        events = engine.step()
        now = time.perf_counter()
        held = _kv_bytes(engine.stages)
        kv_peak, kv_seconds, last = max(kv_peak, held), kv_seconds + held * (now - last), now
        for event in events:
            if isinstance(event, SequenceTokens):
                token_times[event.sequence].append(now)
            elif isinstance(event, SequenceFinished):
                receipts.append(event.receipt)
    wall = last - began
    outputs = sum(map(len, token_times.values()))
    prefill, decode = pipeline.turns[StepKind.PREFILL], pipeline.turns[StepKind.DECODE]
    first = [times[0] - began for times in token_times.values()]
    gaps = [later - sooner for times in token_times.values() for sooner, later in pairwise(times)]
    spent, whole = _spent(engine.stages), sum(map(sum, pipeline.turns.values()))
    shares = {what: (spent[what] - before[what]) / whole for what in MEASURED}
    return Run(
        wall_seconds=wall,
        output_tokens_per_second=outputs / wall,
        prefill_tokens_per_second=sum(receipt.prompt_tokens for receipt in receipts) / sum(prefill),
        decode_tokens_per_second=(outputs - len(requests)) / sum(decode) if decode else 0.0,
        prefill_seconds=sum(prefill),
        decode_seconds=sum(decode),
        turns={kind.value: len(turns) for kind, turns in pipeline.turns.items()},
        shares=shares | {"python": 1 - sum(shares.values())},
        decode_step_p50=median(decode) if decode else 0.0,
        ttft_p50=median(first),
        ttft_p99=percentile99(first),
        inter_token_p50=median(gaps) if gaps else 0.0,
        inter_token_p99=percentile99(gaps),
        kv_bytes_peak=kv_peak,
        kv_bytes_mean=round(kv_seconds / wall),
        spilled_bytes=sum(receipt.spilled_bytes for receipt in receipts),
        kv_keep_reached=min(receipt.kv_keep_reached for receipt in receipts),
    )


def _spent(stages: Iterable[Stage]) -> dict[str, float]:
    """Where the shards' time has gone so far."""
    return {what: sum(stage.seconds[what] for stage in stages) for what in MEASURED}


def _kv_bytes(stages: Iterable[Stage]) -> int:
    return sum(stage.cache.pool.allocator.pages_in_use * stage.cache.pool.page_bytes for stage in stages)
