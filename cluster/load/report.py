"""What a run against a cluster comes to: a few numbers, and how it went over time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from cluster.load.player import Played, Run
from pyramidserve.types import StageState
from workers.percentile import percentile

WINDOWS = 30


@dataclass(frozen=True)
class Objective:
    """What users are promised, in seconds: time to the first token, and mean time between tokens."""

    first_token: float
    inter_token: float

    def met_by(self, turn: Played) -> bool:
        """Whether a turn that has ended kept the promise."""
        return turn.first_token <= self.first_token and mean(turn.gaps or [0.0]) <= self.inter_token


def summarise(run: Run, objective: Objective, warm_up: float) -> dict[str, Any]:
    """Numbers of the turns that were due after ``warm_up`` seconds and could have ended within the run.

    Turns that were due so late that they were cut off are not failures, but those before them that have
    not even begun are late.
    """
    seconds = run.seconds - warm_up
    due = [turn for turn in run.turns if warm_up <= turn.due <= run.seconds - objective.first_token]
    begun = [turn for turn in due if turn.times]
    done = [turn for turn in run.turns if turn.receipt and turn.times[-1] >= warm_up]
    failed: dict[str, int] = {}
    for turn in due:
        if turn.error:
            failed[turn.error] = failed.get(turn.error, 0) + 1
    # One that has not begun has waited at least until the end.
    waits = [turn.first_token if turn.times else run.seconds - turn.due for turn in due if not turn.error]
    gaps = [gap for turn in begun for gap in turn.gaps]
    pools = [
        stage
        for sample in run.samples
        if sample.moment >= warm_up and sample.state.queued
        for pipeline in sample.state.pipelines
        for stage in pipeline.stages
    ]
    return {
        "turns_due": len(due),
        "turns_done": len(done),
        "turns_failed": failed,
        "requests_per_second": len(done) / seconds,
        "goodput_per_second": sum(map(objective.met_by, done)) / seconds,
        "output_tokens_per_second": sum(len(turn.times) for turn in done) / seconds,
        "ttft_p50": percentile(waits, 50),
        "ttft_p99": percentile(waits, 99),
        "inter_token_p50": percentile(gaps, 50),
        "inter_token_p99": percentile(gaps, 99),
        # Of moments at which something waited.
        "pool_used_when_queued": mean(s.pages_in_use / s.pages_total for s in pools) if pools else None,
        "queued_mean": mean([sample.state.queued for sample in run.samples] or [0]),
        "running_mean": mean([sample.state.running for sample in run.samples] or [0]),
        "preemptions": sum(turn.receipt.preemptions for turn in done if turn.receipt),
        "spilled_bytes": sum(turn.receipt.spilled_bytes for turn in done if turn.receipt),
        "within_objective": percentile(waits, 99) <= objective.first_token
        and percentile([mean(turn.gaps or [0.0]) for turn in done], 99) <= objective.inter_token,
    }


def series(run: Run, objective: Objective) -> dict[str, Any]:
    """The cluster over time, and what users saw: each wait, and numbers of ``WINDOWS`` parts of the run.

    None is where there is nothing to tell.
    """
    samples = run.samples
    names = sorted({each.pipeline_id for sample in samples for each in sample.state.pipelines})
    pages: dict[str, list[float | None]] = {name: [] for name in names}
    for sample in samples:
        there = {each.pipeline_id: each.stages for each in sample.state.pipelines}
        for name in names:
            pages[name].append(_pages_used(there[name]) if name in there else None)
    return {
        "moment": [sample.moment for sample in samples],
        "queued": [sample.state.queued for sample in samples],
        "running": [sample.state.running for sample in samples],
        "pipelines": [len(sample.state.pipelines) for sample in samples],
        "pages_used": pages,
        "host_bytes": [
            sum(stage.host_bytes for each in sample.state.pipelines for stage in each.stages)
            for sample in samples
        ],
        "due": [turn.due for turn in run.turns],
        "ttft": [turn.first_token if turn.times else None for turn in run.turns],
        "windows": [_window(run, objective, number) for number in range(WINDOWS)],
    }


def _pages_used(stages: Sequence[StageState]) -> float:
    return sum(stage.pages_in_use for stage in stages) / sum(stage.pages_total for stage in stages)


def _window(run: Run, objective: Objective, number: int) -> dict[str, float | None]:
    """What one of ``WINDOWS`` equal parts of the run saw of first tokens, gaps and ends."""
    seconds = run.seconds / WINDOWS
    begin, end = number * seconds, (number + 1) * seconds
    waits = [turn.first_token for turn in run.turns if turn.times and begin <= turn.times[0] < end]
    gaps = [
        after - before
        for turn in run.turns
        for before, after in pairwise(turn.times)
        if begin <= after < end
    ]
    good = [turn for turn in run.turns if turn.receipt and begin <= turn.times[-1] < end]
    return {
        "moment": (begin + end) / 2,
        "ttft_p50": percentile(waits, 50) if waits else None,
        "ttft_p99": percentile(waits, 99) if waits else None,
        "inter_token_p99": percentile(gaps, 99) if gaps else None,
        "goodput": sum(map(objective.met_by, good)) / seconds,
    }
