"""The traffic: lengths as published, arrivals as asked for, and the same for the same seed."""

import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import pytest

from cluster.commands.bench_serve import TRACE, describe_trace
from cluster.load.trace import (
    BURST_PERIOD,
    BURST_SECONDS,
    DAY_SECONDS,
    Arrivals,
    Session,
    Turn,
    arrivals,
    draw_sessions,
    intensity,
    read_trace,
    write_trace,
)
from pyramidserve.errors import InvalidRequestError

ROOT = Path(__file__).parents[3]


def test_the_committed_trace_is_what_its_command_draws(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    subprocess.run([sys.executable, "-m", "cluster.load.trace", file], check=True, cwd=ROOT)
    assert file.read_bytes() == TRACE.read_bytes()


def test_the_committed_trace_has_the_lengths_of_its_sources() -> None:
    sessions = read_trace(TRACE)
    prompts = [each.prompt_tokens(turn) for each in sessions for turn in range(len(each.turns))]
    assert median(prompts) == pytest.approx(1020, rel=0.05)
    assert median(turn.answer_tokens for each in sessions for turn in each.turns) == pytest.approx(
        129, rel=0.05
    )
    assert mean(len(each.turns) for each in sessions) == pytest.approx(2.0, rel=0.05)
    assert "tokens of prompts p5 384, p50 1056" in describe_trace(sessions)


def test_a_prompt_is_the_history_and_the_message() -> None:
    session = Session((Turn(10, 3, 1.0), Turn(5, 2, 1.0), Turn(7, 1, 1.0)))
    assert [session.prompt_tokens(turn) for turn in range(3)] == [10, 18, 27]


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    sessions = draw_sessions(5, 3)
    write_trace(sessions, tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == sessions


@pytest.mark.parametrize("content", [None, "nonsense", "{}", '{"sessions": [[[1]]]}'])
def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "trace.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidRequestError, match=r"trace\.json"):
        read_trace(file)


@pytest.mark.parametrize("kind", ["poisson", "bursty", "diurnal"])
def test_arrivals_come_at_the_rate_asked_for(kind: Arrivals) -> None:
    seconds = 20 * DAY_SECONDS
    moments = list(arrivals(kind, 2.0, seconds, 0))
    assert moments == sorted(moments)
    assert len(moments) / seconds == pytest.approx(2.0, rel=0.03)
    assert moments == list(arrivals(kind, 2.0, seconds, 0))
    assert moments != list(arrivals(kind, 2.0, seconds, 1))


def test_bursts_and_days_have_their_shapes() -> None:
    moments = list(arrivals("bursty", 2.0, 6000, 0))
    inside = sum(moment % BURST_PERIOD < BURST_SECONDS for moment in moments)
    assert inside / len(moments) == pytest.approx(60 / 110, rel=0.05)
    assert intensity("diurnal", 0) == pytest.approx(0.2)
    assert intensity("diurnal", DAY_SECONDS / 2) == pytest.approx(1.8)
    assert intensity("poisson", 7) == 1
