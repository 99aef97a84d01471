"""Which session a conversation goes on from whose client gives no name, told by what was said. Pure."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from pyramidserve.types import ChatMessage
from workers.model.transcript import Transcript


class Conversations:
    """Sessions by the digests of all that was said in them, the most recently used last."""

    def __init__(self, limit: int) -> None:
        """Remembers ``limit`` of them."""
        self._limit = limit
        self._sessions: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def remember(self, owner: str, turn: Transcript, session_id: str) -> None:
        """Notes what was said in a session of ``owner``, whom alone it is told."""
        *_, (_, said) = _prefixes(owner, turn.conversation)
        self._sessions[said] = session_id
        self._sessions.move_to_end(said)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)

    def find(self, owner: str, messages: Sequence[ChatMessage], usable: Callable[[str], bool]) -> str:
        """The ``usable`` session in which most of ``messages`` was said, from the first on; "": none."""
        replied = [said for message, said in _prefixes(owner, messages) if message.role == "assistant"]
        known = (self._sessions.get(said, "") for said in reversed(replied))
        return next((session_id for session_id in known if session_id and usable(session_id)), "")


def _prefixes(owner: str, messages: Sequence[ChatMessage]) -> Iterator[tuple[ChatMessage, bytes]]:
    """Each message, with a digest of all up to it."""
    said = hashlib.sha256(owner.encode())
    for message in messages:
        content = message.said.encode()
        said.update(f"\0{message.role}\0{len(content)}\0".encode() + content)
        yield message, said.digest()
