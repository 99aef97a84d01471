"""How long replies become, learnt from those that have ended."""

from bisect import bisect_left, insort
from collections import deque

from cluster.admit.request import ValidatedRequest
from workers.budget.pages import PAGE_TOKENS, pages_for
from workers.schedule.validation import EXPECTED_TOKENS

# So many replies are remembered; with fewer than LEAST nothing is concluded from them.
REMEMBERED, LEAST = 256, 16


class OutputLengths:
    """Output tokens of the last replies that ended by themselves."""

    def __init__(self, share: float) -> None:
        """``share``: the part of them that are no longer than expected, as in AdmitTuning."""
        self._share = share
        self._lengths: deque[int] = deque()
        self._ordered: list[int] = []

    def count(self, request: ValidatedRequest, output_tokens: int) -> None:
        """Takes note of a reply; not of one that could not but run to its limit."""
        if request.stopping.ignore_eos:
            return
        self._lengths.append(output_tokens)
        insort(self._ordered, output_tokens)
        if len(self._lengths) > REMEMBERED:
            del self._ordered[bisect_left(self._ordered, self._lengths.popleft())]

    def expected(self, request: ValidatedRequest) -> int:
        """Output tokens that ``request`` will probably have, resumed ones included.

        In whole pages, so that it changes seldom.
        """
        known = len(self._ordered) >= LEAST
        if request.stopping.ignore_eos or (request.limited and not known):
            return request.max_tokens
        last = self._ordered[round(self._share * (len(self._ordered) - 1))] if known else EXPECTED_TOKENS
        usual = PAGE_TOKENS * pages_for(last)
        least = len(request.resume_output_ids) + 1
        return max(least, min(usual, request.max_tokens))
