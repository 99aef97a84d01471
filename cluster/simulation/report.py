"""What a simulated run comes to, in the terms of `bench serve` but for single gaps, as it has none."""

from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.load.report import Objective
from cluster.simulation.run import Simulated
from workers.percentile import percentile

_Seconds = npt.NDArray[np.float64]


def summarise(run: Simulated, objective: Objective, warm_up: float) -> dict[str, Any]:
    """Numbers of the turns that came after ``warm_up`` seconds and could have ended within the run.

    One that has not begun has waited at least until the end. ``turn_inter_token`` are seconds a token of
    whole turns: a turn's mean, where `bench serve` has every gap.
    """
    turns, seconds = run.turns, run.seconds - warm_up
    arrived, began, first, ended = map(
        np.array, (turns.arrived, turns.began, turns.first_token, turns.ended)
    )
    answers, refused = np.array(turns.answer_tokens), np.array(turns.refused) > 0
    due = (arrived >= warm_up) & (arrived <= run.seconds - objective.first_token)
    done = ended >= warm_up  # NaN is not
    waits = np.nan_to_num(first, nan=run.seconds) - arrived
    queued = np.nan_to_num(began, nan=run.seconds) - arrived
    paces = (ended - first) / np.maximum(1, answers - 1)
    good = done & (waits <= objective.first_token) & (paces <= objective.inter_token)
    since, last = next(each for each in run.samples if each.moment >= warm_up), run.samples[-1]
    ttft, pace = _percentiles(waits[due & ~refused], 50, 90, 99), _percentiles(paces[done], 50, 99)
    queue = _percentiles(queued[due & ~refused], 50, 90, 99)
    return {
        "turns_due": int(due.sum()),
        "turns_done": int(done.sum()),
        "turns_refused": int((due & refused).sum()),
        "requests_per_second": done.sum() / seconds,
        "goodput_per_second": good.sum() / seconds,
        "output_tokens_per_second": answers[done].sum() / seconds,
        **{f"ttft_p{share}": value for share, value in ttft.items()},
        **{f"queue_p{share}": value for share, value in queue.items()},
        **{f"turn_inter_token_p{share}": value for share, value in pace.items()},
        "memory_filled": (last.page_seconds - since.page_seconds) / (last.capacity - since.capacity),
        "running_mean": mean(each.running for each in run.samples),
        "pipelines_mean": mean(each.pipelines for each in run.samples),
        "pipelines_most": max(each.pipelines for each in run.samples),
        "preemptions": int(np.array(turns.preemptions)[done].sum()),
        "decisions": run.decisions,
        "decisions_per_second": run.decisions / run.router_seconds,
        "within_objective": ttft[99] <= objective.first_token and pace[99] <= objective.inter_token,
    }


def _percentiles(values: _Seconds, *shares: int) -> dict[int, float]:
    return {share: percentile(values.tolist(), share) for share in shares}
