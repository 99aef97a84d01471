"""How a stream that was cut goes on where it was."""

import time
from collections.abc import Callable

from pyramidserve.errors import PyramidServeError, ServerLeftError, UnavailableError
from pyramidserve.types import Event, Started, Tokens
from pyramidserve.v1 import inference_pb2 as pb

RESUME_SECONDS = 60.0
_RETRY_DELAY = 1.0


class Resumption:
    """What is known of one reply, and how to ask for the rest of it.

    A stream is resumed when the server is lost after it had begun, or was going away and has not taken it;
    again and again, until for ``seconds`` nothing new has come.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        timeout: float | None,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``timeout``: for the whole reply, in seconds from now."""
        self._request, self._seconds, self._clock = request, seconds, clock
        self._deadline = None if timeout is None else clock() + timeout
        self._begun = False
        self._lost_since: float | None = None

    def take(self, event: Event) -> bool:
        """Takes note of an event; returns whether it is news to the caller."""
        self._lost_since = None
        match event:
            case Started():
                news, self._begun = not self._begun, True
                self._request.sampling.seed = event.seed
                return news
            case Tokens():
                self._request.resume_output_ids.extend(event.token_ids)
        return True

    def delay(self, error: PyramidServeError) -> float | None:
        """Seconds until the rest should be asked for after ``error``; None if it is not to be."""
        now = self._clock()
        if self._lost_since is None:
            self._lost_since = now
        if not isinstance(error, UnavailableError if self._begun else ServerLeftError):
            return None
        wait = _RETRY_DELAY if error.retry_delay is None else error.retry_delay
        left = self._lost_since + self._seconds - now
        return wait if wait <= left else None

    def rest(self) -> tuple[pb.GenerateRequest, float | None]:
        """The request for what is missing, and the seconds that are left for it."""
        if self._deadline is None:
            return self._request, None
        return self._request, max(0.0, self._deadline - self._clock())
