"""One run of a workload, with everything that is to be known of it."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

from workers.engine.engine import Engine, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.engine.stage import Stage
from workers.percentile import percentile
from workers.schedule.step import StepKind

# What a shard's stopwatch tells of; the rest of a step is Python's.
MEASURED = ("gemm", "attention", "selection", "elementwise")


@dataclass(frozen=True)
class Run:
    """One run of a workload; times in seconds, memory in bytes.

    Attributes:
        prefill_tokens_per_second: prompt tokens until the last request's first token.
        decode_tokens_per_second: output behind that moment; both None where requests came in waves.
        prefill_seconds, decode_seconds: what blocks and steps took, in this process's shards.
        turns: how many decode steps, releases, and blocks of prefills there were.
        shares: of the turns' time, by what it went to: MEASURED, and "python" for the rest.
        kv_bytes_mean: over time.
        kv_bytes_decoding: the mean over the decode steps.
        kv_keep_reached: the least fraction of a prompt's KV that was kept.
    """

    wall_seconds: float
    output_tokens_per_second: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
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
    kv_bytes_decoding: int
    spilled_bytes: int
    kv_keep_reached: float


class TurnLog:
    """How long the decode steps, releases, and blocks of prefills took."""

    def __init__(self) -> None:
        self.seconds: dict[StepKind, list[float]] = {kind: [] for kind in StepKind}

    def __call__(self, kind: StepKind, seconds: float) -> None:
        self.seconds[kind].append(seconds)

    def clear(self) -> None:
        """Forgets all."""
        for seconds in self.seconds.values():
            seconds.clear()


def measure(engine: Engine, log: TurnLog, requests: Sequence[EngineRequest]) -> Run:
    """Runs ``requests`` together on an idle engine, whose turns ``log`` is told of."""
    log.clear()
    before = _spent(engine.stages)
    decoding = log.seconds[StepKind.DECODE]
    began = last = time.perf_counter()
    token_times: dict[int, list[float]] = {engine.submit(request)[0]: [] for request in requests}
    receipts, kv_seconds, kv_peak = [], 0.0, 0
    kv_decoding = [0]
    while not engine.idle:
        decoded = len(decoding)
        events = engine.step()
        now, held = time.perf_counter(), _kv_bytes(engine)
        kv_decoding += [held] * (len(decoding) - decoded)
        kv_peak, kv_seconds, last = max(kv_peak, held), kv_seconds + held * (now - last), now
        for event in events:
            if isinstance(event, SequenceTokens):
                token_times[event.sequence].append(now)
            elif isinstance(event, SequenceFinished):
                receipts.append(event.receipt)
    wall = last - began
    times = list(token_times.values())
    outputs, prefilled = sum(map(len, times)), max(each[0] for each in times)
    together = prefilled <= min(each[-1] for each in times)
    later = sum(moment > prefilled for each in times for moment in each)
    gaps = [later - sooner for each in times for sooner, later in pairwise(each)]
    prefill = log.seconds[StepKind.PREFILL]
    spent, whole = _spent(engine.stages), sum(map(sum, log.seconds.values()))
    shares = {what: (spent[what] - before[what]) / whole for what in MEASURED}
    first = [each[0] - began for each in times]
    return Run(
        wall_seconds=wall,
        output_tokens_per_second=outputs / wall,
        prefill_tokens_per_second=(
            sum(receipt.prompt_tokens for receipt in receipts) / (prefilled - began) if together else None
        ),
        decode_tokens_per_second=later / (last - prefilled) if together and later else None,
        prefill_seconds=sum(prefill),
        decode_seconds=sum(decoding),
        turns={kind.value: len(seconds) for kind, seconds in log.seconds.items()},
        shares=shares | {"python": 1 - sum(shares.values())},
        decode_step_p50=median(decoding or [0.0]),
        ttft_p50=median(first),
        ttft_p99=percentile(first, 99),
        inter_token_p50=median(gaps or [0.0]),
        inter_token_p99=percentile(gaps, 99),
        kv_bytes_peak=kv_peak,
        kv_bytes_mean=round(kv_seconds / wall),
        kv_bytes_decoding=round(mean(kv_decoding[1:] or kv_decoding)),
        spilled_bytes=sum(receipt.spilled_bytes for receipt in receipts),
        kv_keep_reached=min(receipt.kv_keep_reached for receipt in receipts),
    )


def warm_up(engine: Engine, log: TurnLog, requests: Sequence[EngineRequest]) -> None:
    """Leaves an idle engine as on a server that has run for a while, once it has run ``requests``."""
    for stage in engine.stages:
        stage.cache.device.pool.rows.zero_()
    measure(engine, log, requests)


def _spent(stages: Iterable[Stage]) -> dict[str, float]:
    """Where the shards' time has gone so far."""
    return {what: sum(stage.seconds[what] for stage in stages) for what in MEASURED}


def _kv_bytes(engine: Engine) -> int:
    """What all shards held behind the last step."""
    shards = zip(engine.loop.memory, engine.facts, strict=False)
    return sum(memory.pages_in_use * fact.layout.page_bytes for memory, fact in shards)
