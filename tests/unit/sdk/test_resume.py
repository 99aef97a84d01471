"""When and how the rest of a reply is asked for."""

import pytest

from pyramidserve._resume import Resumption
from pyramidserve.errors import (
    EngineError,
    OverloadedError,
    PyramidServeError,
    ServerLeftError,
    UnavailableError,
)
from pyramidserve.types import Started, Tokens
from pyramidserve.v1 import inference_pb2 as pb

LOST = UnavailableError("lost", retry_delay=2.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def resumption(clock: Clock, timeout: float | None = None, begun: bool = True) -> Resumption:
    made = Resumption(pb.GenerateRequest(request_id="r"), timeout, 5.0, clock)
    if begun:
        assert made.take(Started(1, 9))
    return made


def test_the_rest_is_behind_what_has_come() -> None:
    reply = resumption(Clock())
    for index, token in enumerate((4, 5)):
        assert reply.take(Tokens(index, (token,), "x"))
    request, left = reply.rest()
    assert list(request.resume_output_ids) == [4, 5]
    assert (request.sampling.seed, left) == (9, None)
    assert not reply.take(Started(1, 9))  # the caller has been told


@pytest.mark.parametrize("error", [EngineError("x"), OverloadedError("x", retry_delay=1.0)])
def test_other_errors_end_the_reply(error: PyramidServeError) -> None:
    assert resumption(Clock()).delay(error) is None


def test_what_has_not_begun_fails_at_once() -> None:
    assert resumption(Clock(), begun=False).delay(LOST) is None


def test_what_a_server_that_leaves_has_not_taken_is_asked_for_again() -> None:
    left = ServerLeftError("gone", retry_delay=0.2)
    assert resumption(Clock(), begun=False).delay(left) == 0.2
    assert resumption(Clock()).delay(left) == 0.2


def test_it_is_asked_for_until_nothing_has_come_for_long() -> None:
    clock = Clock()
    reply = resumption(clock)
    assert reply.delay(LOST) == 2.0
    clock.now = 3.0
    assert reply.delay(LOST) == 2.0
    clock.now = 3.1
    assert reply.delay(LOST) is None
    assert reply.take(Tokens(0, (1,), "x"))
    assert reply.delay(LOST) == 2.0


def test_a_timeout_is_for_the_whole_reply() -> None:
    clock = Clock()
    reply = resumption(clock, timeout=10.0)
    clock.now = 4.0
    assert reply.rest()[1] == 6.0
    clock.now = 14.0
    assert reply.rest()[1] == 0.0
