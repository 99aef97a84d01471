"""The log tells a request's whole life by its id, and nothing of what it says."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fake_head import cancelled, failed, finished, hello, request, tokens
from test_router import NO_ROOM, Bench, end_of, events

from cluster.route.live_requests import REPLAYS, error_facts
from pyramidserve.errors import InvalidRequestError, RequestCancelledError, UnavailableError
from workers.events import EventFormatter

FORMATTER = EventFormatter({})


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.DEBUG)
    yield caplog
    for record in caplog.records:
        written = FORMATTER.format(record)
        assert "4711" not in written  # the id of every output token, and its text
        assert "prompt_ids" not in written


def life(log: pytest.LogCaptureFixture, request_id: str = "r") -> list[dict[str, Any]]:
    """The events of a request, in order."""
    lines = [json.loads(FORMATTER.format(record)) for record in log.records]
    return [line for line in lines if line.get("request_id") == request_id]


def names(log: pytest.LogCaptureFixture, request_id: str = "r") -> list[str]:
    return [line["event"].removeprefix("request_") for line in life(log, request_id)]


def test_a_request_is_queued_admitted_begins_and_finishes(log: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    follower = bench.router.submit(request("r", 2, resume_output_ids=(4711,)), "tenant-a")
    bench.now = 1.0
    pipeline = bench.router.attach(hello("p"))
    bench.now = 3.0
    for index in range(1, 16):
        bench.report(pipeline, tokens=[tokens(1, index, 4711)])
    bench.now = 8.0
    bench.report(pipeline, finished=[finished(1, "r", 16)])
    events(follower)
    assert names(log) == ["queued", "admitted", "first_token", "finished"]
    queued, admitted, first, end = life(log)
    assert all(line["tenant"] == "tenant-a" for line in life(log))
    assert (queued["prompt_tokens"], queued["max_tokens"], queued["resumed_tokens"]) == (17, 16, 1)
    assert queued["policy"] == "full"
    assert (admitted["pipeline"], admitted["sequence"], admitted["since_arrival"]) == ("p", 1, 1.0)
    assert (first["pipeline"], first["since_arrival"]) == ("p", 3.0)
    assert (end["pipeline"], end["reason"], end["output_tokens"]) == ("p", "length", 16)
    assert (end["time_to_first_token"], end["since_arrival"]) == (3.0, 8.0)


def test_a_request_that_nobody_follows_is_cancelled(log: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello("p"))
    bench.submit("r").close()
    bench.report(pipeline, failed=[cancelled(1)])
    assert names(log) == ["queued", "admitted", "cancelled"]
    assert life(log)[-1]["reason"] == RequestCancelledError.reason


def test_a_lost_pipeline_and_one_without_room_are_told(log: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    lost = bench.router.attach(hello("lost"))
    follower = bench.submit("r")
    bench.report(lost, tokens=[tokens(1, 0, 4711)])
    bench.router.detach(lost)
    other = bench.router.attach(hello("other"))
    bench.report(other, failed=[failed(2, NO_ROOM)])
    bench.fire_timers()
    assert names(log) == [
        "queued", "admitted", "first_token", "replayed", "admitted", "requeued", "admitted",
    ]  # fmt: skip
    assert [line.get("pipeline") for line in life(log)[1:]] == ["lost"] * 3 + ["other"] * 3
    assert [line["output_tokens"] for line in life(log) if "output_tokens" in line] == [0, 1, 1, 1]
    follower.close()


def test_what_cannot_end_fails_with_its_reason(log: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    follower = bench.submit("r")
    for number in range(REPLAYS + 1):
        bench.router.detach(bench.router.attach(hello(str(number))))
    assert end_of(follower).reason == "unavailable"
    end = life(log)[-1]
    assert (end["event"], end["reason"]) == ("request_failed", "unavailable")
    assert "lost 6 pipelines" in end["message"]


def test_who_joins_is_told(log: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    followers = bench.submit("r"), bench.submit("r")
    assert names(log) == ["queued", "joined"]
    for follower in followers:
        follower.close()


def test_a_token_or_a_step_is_no_event(log: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello("p"))
    follower = bench.submit("r")
    bench.report(pipeline, tokens=[tokens(1, 0, 4711)])
    before = len(log.records)
    for index in range(1, 16):
        bench.report(pipeline, tokens=[tokens(1, index, 4711)])
    assert len(log.records) == before
    follower.close()


def test_what_is_wrong_with_a_request_is_not_logged() -> None:
    wrong = InvalidRequestError("the stop string 'my secret' is not of this model")
    assert error_facts(wrong) == {"reason": "invalid_request"}
    lost = UnavailableError("request 'r' lost 6 pipelines")
    assert error_facts(lost) == {"reason": "unavailable", "message": "request 'r' lost 6 pipelines"}
