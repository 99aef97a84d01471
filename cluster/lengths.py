"""How long replies become, learnt from those that have ended."""

from collections import deque
from statistics import quantiles

from cluster.requests import ValidatedRequest

# So many replies are remembered; with fewer than LEAST nothing is concluded from them.
REMEMBERED, LEAST = 256, 16
# Three in four are no longer than expected; when others are, a pipeline makes room.
QUARTER = 2


class OutputLengths:
    """Output tokens of the last replies that ended by themselves."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=REMEMBERED)
        self._expected: int | None = None

    def count(self, request: ValidatedRequest, output_tokens: int) -> None:
        """Takes note of a reply; not of one that could not but run to its limit."""
        if request.stopping.ignore_eos:
            return
        self._lengths.append(output_tokens)
        if len(self._lengths) >= LEAST:
            self._expected = round(quantiles(self._lengths, n=4, method="inclusive")[QUARTER])

    def expected(self, request: ValidatedRequest) -> int:
        """Output tokens that ``request`` will probably have, resumed ones included."""
        if self._expected is None or request.stopping.ignore_eos:
            return request.max_tokens
        least = len(request.resume_output_ids) + 1
        return max(least, min(self._expected, request.max_tokens))
