"""The last turns of conversations: what was said in those that ended well, of so many sessions."""

from fake_pipeline import FakePipeline, Spoken, layout, request

from pyramidserve.chat import Chat
from pyramidserve.types import ChatMessage
from workers.engine.conversations import Conversations
from workers.engine.loop import EngineLoop

ASKED = (ChatMessage("user", "hello"),)


class Talking:
    """Sessions whose turns are answered with as many of the letter A as they ask for."""

    def __init__(self, limit: int) -> None:
        self.conversations = Conversations(limit)
        self.loop = EngineLoop(layout(), FakePipeline(), Spoken(), ())
        self.turns = 0

    def begin(self, session_id: str, answer: int = 1) -> int:
        self.turns += 1
        wanted = request(self.turns, max_tokens=answer)
        assert self.loop.admit(wanted)
        self.conversations.begin(self.turns, session_id, Chat(ASKED), wanted.prompt_ids)
        return self.turns

    def end(self) -> None:
        while not self.loop.idle:
            for event in self.loop.advance():
                self.conversations.take_down(event)

    def say(self, *session_ids: str) -> None:
        for session_id in session_ids:
            self.begin(session_id)
            self.end()

    def remembered(self, *session_ids: str) -> str:
        return "".join(each for each in session_ids if self.conversations.last_turn(each))


def test_a_turn_that_has_ended_is_its_sessions_last() -> None:
    talking = Talking(4)
    talking.say("a")
    sequence = talking.begin("a", answer=3)
    talking.end()
    last = talking.conversations.last_turn("a")
    assert last is not None
    assert (last.chat.messages, last.reply) == (ASKED, "AAA")
    assert list(last.prompt_ids) == [1000 * sequence, 1000 * sequence + 1, 1000 * sequence + 2]
    assert list(last.output_ids) == [65, 65, 65]


def test_a_turn_that_is_cancelled_leaves_the_one_before_it() -> None:
    talking = Talking(4)
    talking.begin("a", answer=2)
    talking.end()
    sequence = talking.begin("a", answer=4)
    talking.loop.advance()
    talking.loop.cancel(sequence)
    talking.end()
    last = talking.conversations.last_turn("a")
    assert last is not None
    assert last.reply == "AA"
    assert not talking.conversations._running


def test_the_least_recently_used_session_is_forgotten_for_one_too_many() -> None:
    talking = Talking(3)
    talking.say("a", "b", "c", "a")
    assert talking.conversations.last_turn("b")  # which uses it
    talking.say("d")
    assert talking.remembered("a", "b", "c", "d") == "abd"
    talking.say(*map(str, range(100)))
    assert talking.remembered("a", "b", "d", "97", "98", "99") == "979899"
    assert len(talking.conversations) == 3


def test_a_session_that_ends_is_forgotten() -> None:
    talking = Talking(3)
    talking.say("a", "b")
    talking.conversations.end("a")
    talking.conversations.end("never heard of")
    assert talking.remembered("a", "b") == "b"
