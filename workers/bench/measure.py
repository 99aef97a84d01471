"""One run of a workload, with everything that is to be known of it."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from torch.profiler import ProfilerActivity, profile

from workers.engine.engine import Engine, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.engine.pipeline import LocalPipeline, Outcome
from workers.engine.sequence import percentile99
from workers.engine.stage import Stage
from workers.engine.step import StepKind


@dataclass(frozen=True)
class Run:
    """One run of a workload; times in seconds, memory in bytes.

    Attributes:
        steps: how many there were of each kind, by its name.
        kv_bytes_mean: over time.
        kv_keep_reached: the least fraction of a prompt's KV that was kept.
    """

    wall_seconds: float
    output_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    steps: dict[str, int]
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
    """A local pipeline that notes how long each step took."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__(stages)
        self.steps: list[tuple[StepKind, float]] = []

    def collect(self) -> Outcome:
        began = time.perf_counter()
        outcome = super().collect()
        self.steps.append((outcome[0].kind, time.perf_counter() - began))
        return outcome

    def seconds(self, kind: StepKind) -> list[float]:
        """How long the steps of ``kind`` took."""
        return [seconds for each, seconds in self.steps if each is kind]


def measure(engine: Engine, pipeline: TimedPipeline, requests: Sequence[EngineRequest]) -> Run:
    """Runs ``requests`` together on an idle engine; ``pipeline`` is the engine's."""
    pipeline.steps.clear()
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
    prefill, decode = pipeline.seconds(StepKind.PREFILL), pipeline.seconds(StepKind.DECODE)
    first = [times[0] - began for times in token_times.values()]
    gaps = [later - sooner for times in token_times.values() for sooner, later in pairwise(times)]
    return Run(
        wall_seconds=wall,
        output_tokens_per_second=outputs / wall,
        prefill_tokens_per_second=sum(receipt.prompt_tokens for receipt in receipts) / sum(prefill),
        decode_tokens_per_second=(outputs - len(requests)) / sum(decode) if decode else 0.0,
        prefill_seconds=sum(prefill),
        decode_seconds=sum(decode),
        steps={kind.value: len(pipeline.seconds(kind)) for kind in StepKind},
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


def shares(engine: Engine, pipeline: TimedPipeline, requests: Sequence[EngineRequest]) -> dict[str, float]:
    """Shares of the steps' time spent in matrix products, attention, selection and the rest.

    Runs the requests once more, under torch's profiler, which slows the rest down a little.
    """
    before = _fused_seconds(engine.stages)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        run = measure(engine, pipeline, requests)
    gemm, attention = (now - then for now, then in zip(_fused_seconds(engine.stages), before, strict=True))
    spent = {event.key: event.cpu_time_total / 1e6 for event in profiled.key_averages()}
    whole = run.prefill_seconds + run.decode_seconds
    parts = {
        "gemm": spent.get("linear", 0.0) + gemm,
        "attention": spent.get("attention", 0.0) + attention,
        "selection": spent.get("selection", 0.0),
    }
    return {name: seconds / whole for name, seconds in parts.items()} | {
        "other": 1 - sum(parts.values()) / whole
    }


def _fused_seconds(stages: Iterable[Stage]) -> tuple[float, float]:
    """What products and attention have taken within fused decode steps."""
    spent = [stage.fused_seconds for stage in stages]
    return sum(gemm for gemm, _ in spent), sum(attention for _, attention in spent)


def _kv_bytes(stages: Iterable[Stage]) -> int:
    return sum(stage.cache.pool.allocator.pages_in_use * stage.cache.pool.page_bytes for stage in stages)
