"""What a run comes to, from what users saw."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_inference import STATE, receipt

from cluster.load.player import Played, Run, Sample
from cluster.load.plot import draw
from cluster.load.report import WINDOWS, Objective, series, summarise

OBJECTIVE = Objective(first_token=2.0, inter_token=0.5)


def played(due: float, first: float, gap: float = 0.1, tokens: int = 11, done: bool = True) -> Played:
    times = [due + first + gap * index for index in range(tokens)]
    return Played(due, 100, times, receipt("r", tokens) if done else None)


def run_of(*turns: Played) -> Run:
    queued = replace(STATE, queued=3)
    idle = replace(STATE, queued=0)
    return Run(20.0, list(turns), [Sample(5.0, queued), Sample(12.0, queued), Sample(15.0, idle)])


def test_numbers_are_of_what_was_due_behind_the_warm_up() -> None:
    run = run_of(played(1, 9.9, done=True), played(10, 1.0), played(11, 0.5), played(19.5, 0.1, done=False))
    told = summarise(run, OBJECTIVE, warm_up=10.0)
    assert told["turns_due"] == 2
    assert told["turns_done"] == 3  # one of them was due before
    assert told["requests_per_second"] == pytest.approx(0.3)
    assert told["goodput_per_second"] == pytest.approx(0.2)  # it waited too long
    assert told["output_tokens_per_second"] == pytest.approx(3.3)
    assert told["ttft_p50"] == pytest.approx(0.5)
    assert told["inter_token_p50"] == pytest.approx(0.1)
    assert told["within_objective"] is True
    assert told["preemptions"] == 3 * receipt("r", 1).preemptions


def test_one_that_never_began_is_late() -> None:
    told = summarise(run_of(played(10, 0.1), Played(11, 100)), OBJECTIVE, warm_up=10.0)
    assert told["ttft_p99"] > 8.9
    assert told["within_objective"] is False


def test_slow_tokens_miss_the_objective() -> None:
    assert summarise(run_of(played(10, 0.1)), OBJECTIVE, 10.0)["within_objective"] is True
    assert summarise(run_of(played(10, 0.1, gap=0.6)), OBJECTIVE, 10.0)["within_objective"] is False


def test_failures_are_counted_by_their_reason() -> None:
    run = run_of(played(10, 0.1), Played(11, 100, error="queue_full"), Played(12, 100, error="queue_full"))
    told = summarise(run, OBJECTIVE, warm_up=10.0)
    assert told["turns_failed"] == {"queue_full": 2}
    assert told["turns_due"] == 3


def test_the_pool_is_looked_at_while_something_waits() -> None:
    stages = [stage for pipeline in STATE.pipelines for stage in pipeline.stages]
    told = summarise(run_of(played(10, 0.1)), OBJECTIVE, warm_up=10.0)
    shares = [stage.pages_in_use / stage.pages_total for stage in stages]
    assert told["pool_used_when_queued"] == pytest.approx(sum(shares) / len(shares))
    run = run_of(played(10, 0.1))
    run.samples = run.samples[-1:]
    assert summarise(run, OBJECTIVE, warm_up=10.0)["pool_used_when_queued"] is None


def test_a_run_without_turns_has_numbers_too() -> None:
    told = summarise(Run(20.0), OBJECTIVE, warm_up=0.0)
    assert told["turns_due"] == told["ttft_p99"] == 0


def test_a_run_is_told_over_time() -> None:
    run = run_of(played(10, 1.0), played(9, 9.0, tokens=2), Played(11, 100))
    (pipeline,) = STATE.pipelines
    gone = replace(run.samples[-1], state=replace(STATE, queued=0, pipelines=()))
    run.samples[-1] = gone
    told = series(run, OBJECTIVE)
    used = sum(stage.pages_in_use for stage in pipeline.stages)
    share = used / sum(stage.pages_total for stage in pipeline.stages)
    assert told["queued"] == [3, 3, 0]
    assert told["pages_used"] == {pipeline.pipeline_id: [share, share, None]}
    assert told["ttft"] == [1.0, 9.0, None]
    seconds = 20.0 / WINDOWS
    windows = {int(each["moment"] / seconds): each for each in told["windows"]}
    began, ended, late = (windows[int(moment / seconds)] for moment in (11.0, 12.0, 18.0))
    assert (began["ttft_p50"], late["ttft_p99"], ended["ttft_p99"]) == (1.0, 9.0, None)
    assert ended["inter_token_p99"] == pytest.approx(0.1)
    assert ended["goodput"] == pytest.approx(1 / seconds)
    assert late["goodput"] == 0  # it waited too long
    json.dumps(told, allow_nan=False)


def test_a_run_is_drawn(tmp_path: Path) -> None:
    told = series(run_of(played(10, 1.0), Played(11, 100)), OBJECTIVE)
    draw(told, "title", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
