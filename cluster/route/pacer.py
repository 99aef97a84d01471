"""When new output is told: of all streams at once, as messages take cores that engines need."""

import os
from collections.abc import Callable
from typing import Protocol

from cluster.route.tuning import RouteTuning


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
        tuning: RouteTuning,
    ) -> None:
        """``streams``: how many there are; ``clock``: seconds; ``call_later``: calls back after a delay."""
        self._streams, self._clock, self._call_later = streams, clock, call_later
        self._longest_spacing = tuning.longest_spacing
        self._messages_per_second = tuning.messages_per_core * (os.cpu_count() or 1)
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
        spacing = min(self._longest_spacing, self._streams() / self._messages_per_second)
        self._due = self._clock() + spacing
        told, self._untold = self._untold, {}
        for each in told:
            each.tell()
