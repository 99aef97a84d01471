"""Sessions and where they ran."""

import pytest

from cluster.admit.sessions import Sessions
from pyramidserve.chat import Chat
from pyramidserve.errors import UnknownSessionError
from pyramidserve.types import ChatMessage
from workers.model.transcript import Transcript


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_session_is_where_its_last_turn_ran() -> None:
    sessions = Sessions(8, 60, Clock())
    assert sessions.pipeline("s") is None
    sessions.place("s", "p")
    sessions.place("s", "q")
    assert sessions.pipeline("s") == "q"
    assert len(sessions) == 1


def test_its_end_tells_its_turns_and_forgets_it() -> None:
    sessions = Sessions(8, 60, Clock())
    for _ in range(2):
        sessions.place("s", "p")
        sessions.count_turn("s", None)
    assert sessions.end("s") == 2
    assert len(sessions) == 0
    with pytest.raises(UnknownSessionError, match="'s'"):
        sessions.end("s")


def test_a_turn_that_outlives_its_session_does_not_revive_it() -> None:
    sessions = Sessions(8, 60, Clock())
    sessions.place("s", "p")
    assert sessions.end("s") == 0
    sessions.count_turn("s", None)
    assert sessions.pipeline("s") is None


def test_the_least_recently_used_goes_first() -> None:
    sessions = Sessions(2, 60, Clock())
    sessions.place("a", "p")
    sessions.place("b", "p")
    sessions.count_turn("a", None)
    sessions.place("c", "p")
    assert [sessions.pipeline(name) for name in "abc"] == ["p", None, "p"]


def test_an_old_session_is_forgotten() -> None:
    clock = Clock()
    sessions = Sessions(8, 60, clock)
    sessions.place("old", "p")
    clock.now = 50
    sessions.place("new", "p")
    clock.now = 61
    assert sessions.pipeline("old") is None
    assert sessions.pipeline("new") == "p"
    assert len(sessions) == 1
    with pytest.raises(UnknownSessionError):
        sessions.end("old")


def test_what_was_said_has_a_bound() -> None:
    sessions = Sessions(8, 60, Clock(), most_bytes=1000)
    said = Transcript.of(Chat((ChatMessage("user", "x" * 300),)), "y" * 100, [1] * 10, [2] * 10)
    for name in "abc":
        sessions.place(name, "p")
        sessions.count_turn(name, said)
    assert [sessions.last_turn(name) is said for name in "abc"] == [False, True, True]
    sessions.end("c")
    for name in "de":
        sessions.place(name, "p")
        sessions.count_turn(name, said)
    assert [sessions.last_turn(name) is said for name in "bde"] == [False, True, True]
