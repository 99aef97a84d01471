"""When new output is told: of all streams at once, as messages take cores that engines need."""

import os
from collections.abc import Callable
from typing import Protocol

# Messages to clients, of all streams together; and the longest that tokens may wait to be told together, in
# seconds.
MESSAGES_PER_SECOND, LONGEST_SPACING = 75.0 * (os.cpu_count() or 1), 0.25


class Untold(Protocol):
    """What has output that its followers have not been told of."""

    def tell(self) -> None:
        """Tells them."""
        ...


class Pacer:
    """Spaces out the telling, the further the more streams there are, and tells of all together."""

    def __init__(
        self,
        streams: Callable[[], int],
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        """``streams``: how many there are; ``clock``: seconds; ``call_later``: calls back after a delay."""
        self._streams, self._clock, self._call_later = streams, clock, call_later
        self._untold: dict[Untold, None] = {}
        self._due = 0.0
        self._waiting = False

    def add(self, untold: Untold) -> None:
        """Notes that there is something to tell of."""
        self._untold[untold] = None

    def tell(self) -> None:
        """Tells of all that there is, now or as soon as it is due."""
        if not self._untold or self._waiting:
            return
        wait = self._due - self._clock()
        if wait > 0:
            self._waiting = True
            self._call_later(wait, self._tell_now)
        else:
            self._tell_now()

    def _tell_now(self) -> None:
        self._waiting = False
        self._due = self._clock() + min(LONGEST_SPACING, self._streams() / MESSAGES_PER_SECOND)
        told, self._untold = self._untold, {}
        for each in told:
            each.tell()
