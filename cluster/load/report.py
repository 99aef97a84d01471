"""What a run against a cluster comes to: a few numbers, and a picture of it over time."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cluster.load.player import Played, Run
from workers.engine.sequence import percentile


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


def series(run: Run) -> dict[str, list[float]]:
    """The cluster over time, and what users saw."""
    samples = run.samples
    stages = [[stage for each in s.state.pipelines for stage in each.stages] for s in samples]
    return {
        "moment": [sample.moment for sample in samples],
        "queued": [sample.state.queued for sample in samples],
        "running": [sample.state.running for sample in samples],
        "pipelines": [len(sample.state.pipelines) for sample in samples],
        "pages_used": [
            sum(stage.pages_in_use for stage in each) / max(1, sum(stage.pages_total for stage in each))
            for each in stages
        ],
        "host_bytes": [sum(stage.host_bytes for stage in each) for each in stages],
        "due": [turn.due for turn in run.turns],
        "ttft": [turn.first_token if turn.times else float("nan") for turn in run.turns],
    }


def draw(told: dict[str, list[float]], title: str, file: Path) -> None:
    """Draws ``series``."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    figure.suptitle(title)
    panels[0].hist(told["due"], bins=60, color="C7")
    panels[0].set(ylabel="arrivals")
    panels[1].plot(told["due"], told["ttft"], ".", color="C3")
    panels[1].set(ylabel="first token, s", ylim=(0, None))
    for name in ("queued", "running", "pipelines"):
        panels[2].plot(told["moment"], told[name], label=name)
    panels[2].legend(loc="upper left")
    panels[3].plot(told["moment"], [100 * share for share in told["pages_used"]], label="pool in use, %")
    panels[3].plot(told["moment"], [size / 2**20 for size in told["host_bytes"]], label="host, MiB")
    panels[3].legend(loc="upper left")
    panels[3].set(xlabel="seconds")
    figure.savefig(file, dpi=110)
