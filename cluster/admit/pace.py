"""How fast requests have been ending, and what that means for those that wait. Pure."""

from collections import deque
from collections.abc import Callable
from statistics import median

from pyramidserve.errors import RequestTimeoutError

# So many of the last completions count.
COMPLETIONS = 64
# Seconds until a client should try again: with fewer than two completions; and the least and the most.
UNKNOWN_RETRY_DELAY = 1.0
RETRY_DELAY_RANGE = (0.1, 30.0)


class Pace:
    """The last completions: when they were, and their seconds between output tokens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._completions: deque[float] = deque(maxlen=COMPLETIONS)
        self._token_seconds: deque[float] = deque(maxlen=COMPLETIONS)

    def count(self, token_seconds: float) -> None:
        """Notes a completion, now, after ``token_seconds`` a token; 0 if there was one."""
        if token_seconds > 0:
            self._token_seconds.append(token_seconds)
        self._completions.append(self._clock())

    def drain_seconds(self, waiting: int) -> float:
        """Seconds in which ``waiting`` requests end at the rate of the last; 0 if that is not known."""
        if len(self._completions) < 2:
            return 0.0
        return waiting * (self._clock() - self._completions[0]) / (len(self._completions) - 1)

    def retry_delay(self, waiting: int) -> float:
        """Seconds after which a client should try again when ``waiting`` requests fill the queue."""
        if len(self._completions) < 2:
            return UNKNOWN_RETRY_DELAY
        least, most = RETRY_DELAY_RANGE
        return min(max(self.drain_seconds(waiting), least), most)

    def too_late(self, deadline: float, tokens: int, waiting: int) -> RequestTimeoutError | None:
        """Why a request would miss its deadline; None if it might not.

        Prefill is taken to cost nothing, so that none is refused that might be in time.

        Args:
            deadline: on the clock's seconds, finite.
            tokens: output tokens that it will probably have.
            waiting: requests that run before it.
        """
        queue_seconds = self.drain_seconds(waiting)
        needed = queue_seconds + tokens * (median(self._token_seconds) if self._token_seconds else 0.0)
        left = deadline - self._clock()
        if needed <= left:
            return None
        return RequestTimeoutError(
            f"the deadline is in {left:.1f} s, and {tokens} output tokens would take about {needed:.1f} s, "
            f"of these {queue_seconds:.1f} s in the queue; allow more time or ask for fewer max_tokens",
            reason="deadline_unreachable",
        )
