"""Conversations that are found by what was said."""

from cluster.admit.conversations import Conversations
from pyramidserve.chat import Chat
from pyramidserve.types import ChatMessage
from workers.model.transcript import Transcript


def asks(*contents: str) -> tuple[ChatMessage, ...]:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return tuple(ChatMessage(roles[i % 2], each) for i, each in enumerate(contents))  # type: ignore[arg-type]


def turn(*contents: str) -> Transcript:
    """The turn whose reply is the last of ``contents``."""
    return Transcript.of(Chat(asks(*contents[:-1])), contents[-1], [1], [2])


def always(session_id: str) -> bool:
    return True


def test_what_goes_on_is_found_where_most_of_it_was_said() -> None:
    known = Conversations(8)
    known.remember("me", turn("a", "b"), "first")
    known.remember("me", turn("a", "b", "c", "d"), "second")
    assert known.find("me", asks("a", "b", "c", "d", "e"), always) == "second"
    assert known.find("me", asks("a", "b", "x"), always) == "first"
    assert known.find("me", asks("a", "b", "c", "d", "e"), lambda name: name == "first") == "first"


def test_what_differs_anywhere_is_not_found() -> None:
    known = Conversations(8)
    known.remember("me", turn("a", "b"), "s")
    for messages in (asks("a"), asks("a", "c", "d"), asks("x", "b", "c"), asks("ab", "", "c"), asks()):
        assert known.find("me", messages, always) == ""
    assert known.find("you", asks("a", "b", "c"), always) == ""


def test_the_least_recently_used_goes_first() -> None:
    known = Conversations(2)
    for name in ("a", "b", "a", "c"):
        known.remember("me", turn(name, "x"), name)
    assert len(known) == 2
    assert [known.find("me", asks(name, "x", "y"), always) for name in "abc"] == ["a", "", "c"]
