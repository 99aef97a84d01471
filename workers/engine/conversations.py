"""What was said in conversations, as their next turns need it."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyramidserve.chat import Chat
from pyramidserve.tools import ToolCallPart, whole_calls
from workers.engine.loop import (
    LoopEvent,
    SequenceBroken,
    SequenceCancelled,
    SequenceFinished,
    SequenceTokens,
)
from workers.model.transcript import Transcript


@dataclass
class _Turn:
    """A turn that runs, and what has come of it."""

    session_id: str
    chat: Chat
    prompt_ids: Sequence[int]
    text: str = ""
    calls: list[ToolCallPart] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)


class Conversations:
    """The last turns of conversations, by session, and those turns that run, by sequence."""

    def __init__(self, limit: int) -> None:
        """Remembers the last turns of ``limit`` sessions, the most recently used ones."""
        self._limit = limit
        self._last_turns: OrderedDict[str, Transcript] = OrderedDict()
        self._running: dict[int, _Turn] = {}

    def __len__(self) -> int:
        """How many last turns are remembered."""
        return len(self._last_turns)

    def last_turn(self, session_id: str) -> Transcript | None:
        """The last turn of a session that has ended well, if it is remembered."""
        if session_id in self._last_turns:
            self._last_turns.move_to_end(session_id)
        return self._last_turns.get(session_id)

    def begin(self, sequence: int, session_id: str, chat: Chat, prompt_ids: Sequence[int]) -> None:
        """Takes note of a turn that ``chat`` asks for, the whole conversation so far."""
        self._running[sequence] = _Turn(session_id, chat, prompt_ids)

    def take_down(self, event: LoopEvent) -> None:
        """Takes note of what has come of a turn; one that has ended well is its session's last."""
        turn = self._running.get(event.sequence)
        if turn is None:
            return
        if isinstance(event, SequenceTokens):
            turn.text += event.tokens.text
            turn.calls += event.tokens.tool_calls
            turn.output_ids += event.tokens.token_ids
        elif isinstance(event, SequenceFinished):
            self._last_turns[turn.session_id] = Transcript.of(
                turn.chat, turn.text, turn.prompt_ids, turn.output_ids, whole_calls(turn.calls)
            )
            self._last_turns.move_to_end(turn.session_id)
            if len(self._last_turns) > self._limit:
                self._last_turns.popitem(last=False)
        if isinstance(event, SequenceFinished | SequenceCancelled | SequenceBroken):
            self.cancel(event.sequence)

    def cancel(self, sequence: int) -> None:
        """Forgets a turn that runs, if ``sequence`` is one."""
        self._running.pop(sequence, None)

    def end(self, session_id: str) -> None:
        """Forgets a session: its last turn, and whose those are that run."""
        self._last_turns.pop(session_id, None)
        self._running = {key: turn for key, turn in self._running.items() if turn.session_id != session_id}
