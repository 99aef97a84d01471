"""How many pages a pipeline's sequences will take together: less than the sum of their peaks.

Sequences that began at different times end at different times, so that one is small while another is
large. With a token a step for each, the most they take together lies where one of them ends (as in
Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025).
"""

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from workers.budget.footprint import ShardLayout, lifetime_pages
from workers.budget.pages import IntegrityError
from workers.budget.plan import KeepPlan

Pages = tuple[int, ...]
_Floats = npt.NDArray[np.float64]
# Of sums of pages that are whole in truth.
ROUNDING = 1e-6


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

    @cached_property
    def slopes(self) -> _Floats:
        """Pages a token, to the expected end and to the latest: [2, shards]."""
        grown = np.array([self.expected, self.most]) - self.first
        return grown / np.maximum(1, [[self.expected_tokens], [self.most_tokens]])

    def covers(self, other: "Growth") -> bool:
        """Whether this takes, from now on and at any time, at least what ``other`` takes."""
        return (
            # One that is expected to end at once is counted to its latest end.
            self.expected_tokens >= other.expected_tokens > 0
            and all(more >= less for more, less in zip(self.first, other.first, strict=True))
            and bool((self.slopes[0] >= other.slopes[0]).all())
        )


@lru_cache(maxsize=1 << 14)
def growth(plan: KeepPlan, shards: tuple[ShardLayout, ...], expected: int, most: int) -> Growth:
    """How a sequence with ``plan`` grows until it has ``expected``, or ``most``, output tokens."""
    first, at_expected, at_most = lifetime_pages(plan, shards, (expected, most))
    return Growth(first, at_expected, expected - 1, at_most, most - 1)


@dataclass(frozen=True)
class _Profile:
    """Sequences in the order of their ends, the last first.

    Attributes:
        left: tokens to the end of each: [sequences].
        held, slopes: pages now and pages a token of the first none, one, two ... of them together:
            [sequences + 1, shards].
        peaks: pages of those that are still there when each comes to its end: [sequences, shards].
        highest: the most of the first none, one, two ... of ``peaks``: [sequences + 1, shards].
        free: pages that nobody takes now: [shards].
    """

    left: _Floats
    held: _Floats
    slopes: _Floats
    peaks: _Floats
    highest: _Floats
    free: list[float]


class Forecast:
    """The growth of all sequences of a pipeline, and how far each has come.

    Attributes:
        pages: the pool of each shard.
        promised: what the sequences would take if all came to their expected ends together: [shards].
    """

    def __init__(self, pages: Sequence[int], sequences: int, horizon: float = 1.0) -> None:
        """For at most so many ``sequences`` on shards with pools of ``pages``.

        ``horizon``: the part of the way to its end that each is taken to have before it.
        """
        self.pages = tuple(pages)
        self.promised = np.zeros(len(pages))
        self._limit, self._horizon = sequences, horizon
        self._room = np.array(pages) + ROUNDING
        # Where each has its row; rows have no gaps.
        self._rows: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []
        self._first = np.zeros((sequences, len(pages)))
        self._expected = np.zeros((sequences, len(pages)))
        self._most = np.zeros((sequences, len(pages)))
        self._at_most = np.zeros(len(pages))
        # To the expected end, and to the latest.
        self._slope = np.zeros((sequences, 2, len(pages)))
        self._tokens = np.zeros((sequences, 2))
        self._done = np.zeros(sequences)
        self._columns = self._first, self._expected, self._most, self._slope, self._tokens, self._done
        self._profile: _Profile | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._rows

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as there may be."""
        return len(self._rows) == self._limit

    def could_ever_hold(self, more: Growth) -> bool:
        """Whether a sequence fits when nothing else is there."""
        return all(need <= total for need, total in zip(more.most, self.pages, strict=True))

    def fits(self, more: Growth, done: int = 0) -> bool:
        """Whether one more sequence finds room until its end, ``done`` of whose output tokens are fed."""
        if self.full:
            return False
        if bool((self._at_most + more.most <= self._room).all()):
            return True
        there = self._ends()
        # Most that have no room have none even now.
        if any(need > free for need, free in zip(more.first, there.free, strict=True)):
            return False
        late = done >= more.expected_tokens
        slope = more.slopes[int(late)]
        left = self._horizon * max((more.most_tokens if late else more.expected_tokens) - done, 0)
        now = more.first + slope * done
        longer = int(np.searchsorted(-there.left, -left, side="right"))
        sooner = there.peaks[longer:] + now + slope * there.left[longer:, None]
        then = there.held[longer] + now + (there.slopes[longer] + slope) * left
        return all(bool((peak <= self._room).all()) for peak in (then, sooner, there.highest[longer]))

    def peak(self) -> Pages:
        """The most pages of each shard that the sequences will take together."""
        return tuple(np.ceil(self._ends().highest[-1] - ROUNDING).astype(int).tolist())

    def add(self, sequence: Hashable, more: Growth, done: int = 0) -> None:
        """Takes ``sequence`` in. Raises IntegrityError if it is there, or one too many."""
        if sequence in self._rows or self.full:
            raise IntegrityError(f"{sequence!r} cannot be added to {len(self)} sequences")
        row = self._rows[sequence] = len(self._rows)
        self._keys.append(sequence)
        self._first[row] = more.first
        self._expected[row], self._most[row] = more.expected, more.most
        self._slope[row] = more.slopes
        self._tokens[row] = more.expected_tokens, more.most_tokens
        self._done[row] = done
        self.promised += more.expected
        self._at_most += more.most
        self._profile = None

    def advance(self, sequence: Hashable, done: int) -> None:
        """Notes that ``done`` output tokens of ``sequence`` have been fed."""
        self._done[self._rows[sequence]] = done
        self._profile = None

    def remove(self, sequence: Hashable) -> None:
        """Forgets ``sequence``."""
        row = self._rows.pop(sequence)
        self.promised -= self._expected[row]
        self._at_most -= self._most[row]
        last = self._keys.pop()
        if last != sequence:
            self._rows[last], self._keys[row] = row, last
            for column in self._columns:
                column[row] = column[len(self._keys)]
        self._profile = None

    def in_the_way(self, more: Growth) -> frozenset[Hashable]:
        """Of those that are expected to end the soonest, as many as have to before ``more`` fits."""
        rest, leaving = self.without(frozenset()), []
        _, left = self._left()
        for row in np.argsort(left, kind="stable"):
            if rest.fits(more):
                break
            rest.remove(self._keys[row])
            leaving.append(self._keys[row])
        return frozenset(leaving)

    def without(self, leaving: Set[Hashable]) -> "Forecast":
        """The forecast of those that are not ``leaving``."""
        rest = Forecast(self.pages, self._limit, self._horizon)
        rest._keys = [key for key in self._keys if key not in leaving]
        rest._rows = {key: row for row, key in enumerate(rest._keys)}
        rows, count = [self._rows[key] for key in rest._keys], len(rest._keys)
        for mine, its in zip(self._columns, rest._columns, strict=True):
            its[:count] = mine[rows]
        rest.promised, rest._at_most = rest._expected.sum(axis=0), rest._most.sum(axis=0)
        return rest

    def _left(self) -> tuple[npt.NDArray[np.int64], _Floats]:
        """Of each sequence, the end that it is counted to, and tokens from now on that are counted."""
        rows = np.arange(len(self._rows))
        done, tokens = self._done[rows], self._tokens[rows]
        # One that has come to its expected end may go on to the latest.
        end = (done >= tokens[:, 0]).astype(np.int64)
        return end, self._horizon * np.maximum(tokens[rows, end] - done, 0)

    def _ends(self) -> _Profile:
        if self._profile is None:
            count = len(self._rows)
            end, left = self._left()
            order = np.argsort(-left)
            slope, left = self._slope[order, end[order]], left[order]
            # When one ends, those are left that have at least as far to go.
            held = (self._first[order] + slope * self._done[order, None]).cumsum(axis=0)
            slopes = slope.cumsum(axis=0)
            peaks = held + slopes * left[:, None]
            nothing = np.zeros((1, len(self.pages)))
            self._profile = _Profile(
                left,
                np.concatenate((nothing, held)),
                np.concatenate((nothing, slopes)),
                peaks,
                np.concatenate((nothing, np.maximum.accumulate(peaks))),
                (self._room - (held[-1] if count else 0.0)).tolist(),
            )
        return self._profile
