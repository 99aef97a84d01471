"""How many pages a pipeline's sequences will take together: less than the sum of their peaks.

Sequences that began at different times end at different times, so that one is small while another is
large. With a token a step for each, the most they take together lies where one of them ends (as in
Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from workers.compression.plan import KeepPlan
from workers.kv.footprint import ShardLayout, pages_held, peak_pages
from workers.kv.pages import IntegrityError

Pages = tuple[int, ...]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Growth:
    """Pages that a sequence takes of each shard.

    Attributes:
        first: behind its prefill.
        expected: at the end that is expected, ``expected_tokens`` fed output tokens later.
        most: at the latest end, ``most_tokens`` later.
    """

    first: Pages
    expected: Pages
    expected_tokens: int
    most: Pages
    most_tokens: int


@lru_cache(maxsize=4096)
def growth(plan: KeepPlan, shards: tuple[ShardLayout, ...], expected: int, most: int) -> Growth:
    """How a sequence with ``plan`` grows until it has ``expected``, or ``most``, output tokens."""
    return Growth(
        first=tuple(pages_held(plan, shard, 0) for shard in shards),
        expected=tuple(peak_pages(plan, shard, expected) for shard in shards),
        expected_tokens=expected - 1,
        most=tuple(peak_pages(plan, shard, most) for shard in shards),
        most_tokens=most - 1,
    )


class Forecast:
    """The growth of all sequences of a pipeline, and how far each has come."""

    def __init__(self, pages: Sequence[int], sequences: int) -> None:
        """For at most so many ``sequences`` on shards with pools of ``pages``."""
        self.pages = tuple(pages)
        self._sequences: dict[Hashable, int] = {}
        self._unused = list(range(sequences - 1, -1, -1))
        self._first = np.zeros((sequences, len(pages)))
        # To the expected end, and to the latest.
        self._slope = np.zeros((sequences, 2, len(pages)))
        self._tokens = np.zeros((sequences, 2))
        self._done = np.zeros(sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._sequences

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as there may be."""
        return not self._unused

    def could_ever_hold(self, more: Growth) -> bool:
        """Whether a sequence fits when nothing else is there."""
        return all(need <= total for need, total in zip(more.most, self.pages, strict=True))

    def fits(self, more: Growth, done: int = 0) -> bool:
        """Whether one more sequence finds room until its end, ``done`` of whose output tokens are fed."""
        return not self.full and bool((self._peak(more, done) <= self.pages).all())

    def peak(self) -> Pages:
        """The most pages of each shard that the sequences will take together."""
        return tuple(np.ceil(self._peak()).astype(int).tolist())

    def add(self, sequence: Hashable, more: Growth, done: int = 0) -> None:
        """Takes ``sequence`` in. Raises IntegrityError if it is there, or one too many."""
        if sequence in self._sequences or not self._unused:
            raise IntegrityError(f"{sequence!r} cannot be added to {len(self)} sequences")
        index = self._sequences[sequence] = self._unused.pop()
        self._first[index] = more.first
        self._slope[index] = _slopes(more)
        self._tokens[index] = more.expected_tokens, more.most_tokens
        self._done[index] = done

    def advance(self, sequence: Hashable, done: int) -> None:
        """Notes that ``done`` output tokens of ``sequence`` have been fed."""
        self._done[self._sequences[sequence]] = done

    def remove(self, sequence: Hashable) -> None:
        """Forgets ``sequence``."""
        self._unused.append(self._sequences.pop(sequence))

    def _peak(self, more: Growth | None = None, more_done: int = 0) -> _Floats:
        index = list(self._sequences.values())
        first, slope = self._first[index], self._slope[index]
        tokens, done = self._tokens[index], self._done[index]
        if more is not None:
            first, slope = np.append(first, [more.first], axis=0), np.append(slope, [_slopes(more)], axis=0)
            tokens = np.append(tokens, [(more.expected_tokens, more.most_tokens)], axis=0)
            done = np.append(done, more_done)
        if not len(done):
            return np.zeros(len(self.pages))
        # One that has come to its expected end may go on to the latest.
        rows, end = np.arange(len(done)), (done >= tokens[:, 0]).astype(int)
        slope, left = slope[rows, end], np.maximum(tokens[rows, end] - done, 0)
        order = np.argsort(-left)
        # When one ends, those are left that have at least as far to go.
        held = (first + slope * done[:, None])[order].cumsum(axis=0)
        peaks: _Floats = (held + slope[order].cumsum(axis=0) * left[order][:, None]).max(axis=0)
        return peaks


def _slopes(more: Growth) -> _Floats:
    """Pages a token, to the expected end and to the latest: [2, shards]."""
    grown = np.array([more.expected, more.most]) - more.first
    return grown / np.maximum(1, [[more.expected_tokens], [more.most_tokens]])
