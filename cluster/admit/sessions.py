"""Which pipeline served which conversation, and its last turn."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from pyramidserve.errors import UnknownSessionError
from workers.model.transcript import Transcript

# Of all that is remembered: thousands of long conversations.
MOST_BYTES = 256 << 20


@dataclass
class _Session:
    pipeline_id: str
    turns: int
    last_use: float
    last_turn: Transcript | None = None

    @property
    def bytes(self) -> int:
        """Of what was said."""
        return self.last_turn.size if self.last_turn else 0


class Sessions:
    """Live sessions, the least recently used first out."""

    def __init__(
        self, limit: int, max_age: float, clock: Callable[[], float], most_bytes: int = MOST_BYTES
    ) -> None:
        """Remembers at most ``limit`` sessions, each for ``max_age`` seconds after its last use.

        ``most_bytes``: of what was said in all of them.
        """
        self._limit, self._most_bytes, self._bytes = limit, most_bytes, 0
        self._max_age = max_age
        self._clock = clock
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._sessions)

    def pipeline(self, session_id: str) -> str | None:
        """The pipeline that the session last ran on, if the session is known."""
        self._expire()
        session = self._sessions.get(session_id)
        return session.pipeline_id if session else None

    def last_turn(self, session_id: str) -> Transcript | None:
        """The session's last turn, if it is known."""
        self._expire()
        session = self._sessions.get(session_id)
        return session.last_turn if session else None

    def place(self, session_id: str, pipeline_id: str) -> None:
        """Notes that a turn of the session starts on a pipeline."""
        session = self._sessions.setdefault(session_id, _Session(pipeline_id, 0, 0.0))
        session.pipeline_id = pipeline_id
        self._touch(session_id, session)

    def count_turn(self, session_id: str, turn: Transcript | None) -> None:
        """Notes that a turn has been served; nothing if the session has been ended meanwhile.

        ``turn``: what it consisted of, if it was one of a conversation.
        """
        session = self._sessions.get(session_id)
        if session:
            session.turns += 1
            self._bytes -= session.bytes
            session.last_turn = turn
            self._bytes += session.bytes
            self._touch(session_id, session)

    def end(self, session_id: str, begun: bool = False) -> int:
        """Forgets the session and returns the turns served under it.

        ``begun``: a turn of it waits or runs. Raises UnknownSessionError where there is nothing of it.
        """
        self._expire()
        session = self._sessions.pop(session_id, None)
        self._bytes -= session.bytes if session else 0
        if session is None:
            if begun:
                return 0
            raise UnknownSessionError(
                f"there is no session {session_id!r:.140}; it has ended, expired or never begun"
            )
        return session.turns

    def _touch(self, session_id: str, session: _Session) -> None:
        session.last_use = self._clock()
        self._sessions.move_to_end(session_id)
        self._expire()

    def _expire(self) -> None:
        oldest_use = self._clock() - self._max_age
        while self._sessions and (
            len(self._sessions) > self._limit
            or self._bytes > self._most_bytes
            or next(iter(self._sessions.values())).last_use < oldest_use
        ):
            _, session = self._sessions.popitem(last=False)
            self._bytes -= session.bytes
