"""What every sequence of a pipeline holds of each shard's pool, known without asking the shards."""

from collections.abc import Hashable, Sequence

import numpy as np

from workers.budget.footprint import Counts, Footprints, ShardLayout
from workers.budget.pages import IntegrityError
from workers.budget.plan import KeepPlan


class Ledger:
    """Pages that are held, or will be by the steps under way.

    Attributes:
        pages: the shards' pools, int64 [shards].
        free: those of them that nobody holds.
    """

    def __init__(self, shards: Sequence[ShardLayout], pages: Sequence[int], sequences: int) -> None:
        """For at most so many ``sequences``."""
        self.pages: Counts = np.array(pages)
        self.free = self.pages.copy()
        self._index: dict[Hashable, int] = {}
        self._unused = list(range(sequences - 1, -1, -1))
        self._held = np.zeros((sequences, len(shards)), dtype=np.int64)
        self._footprints = Footprints(shards, sequences)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as there may be."""
        return not self._unused

    def add(self, sequence: Hashable, plan: KeepPlan) -> None:
        """Takes ``sequence`` in, which holds nothing yet."""
        index = self._index[sequence] = self._unused.pop()
        self._footprints.set(index, plan)

    def remove(self, sequence: Hashable) -> None:
        """Forgets ``sequence``; what it held is free."""
        self.hold([sequence], np.zeros((1, len(self.pages)), dtype=np.int64))
        self._unused.append(self._index.pop(sequence))

    def needs(self, sequences: Sequence[Hashable], fed: Sequence[int], more: Sequence[int] = ()) -> Counts:
        """Pages of each shard with ``fed`` generated tokens each, and ``more`` before they are compressed.

        int64 [sequences, shards].
        """
        index = [self._index[sequence] for sequence in sequences]
        return self._footprints.pages(index, np.array(fed), np.array(more) if more else 0)

    def needs_to_go_on(self, old: Hashable, generated: int, sequence: Hashable) -> Counts:
        """Pages of each shard while ``sequence`` takes over what ``old`` left, layer by layer.

        int64 [1, shards].
        """
        return self._footprints.pages_to_go_on(self._index[old], generated, self._index[sequence])

    def held(self, sequence: Hashable) -> Counts:
        """Pages that ``sequence`` holds of each shard."""
        held: Counts = self._held[self._index[sequence]]
        return held

    def fits(self, sequences: Sequence[Hashable], pages: Counts) -> bool:
        """Whether ``sequences`` may hold ``pages`` instead of what they do."""
        index = [self._index[sequence] for sequence in sequences]
        return bool(((pages - self._held[index]).sum(axis=0) <= self.free).all())

    def hold(self, sequences: Sequence[Hashable], pages: Counts) -> None:
        """Makes ``sequences`` hold ``pages``. Raises IntegrityError if they are not free."""
        if not self.fits(sequences, pages):
            raise IntegrityError(f"{list(sequences)} cannot hold {pages.tolist()}: {self.free} are free")
        index = [self._index[sequence] for sequence in sequences]
        self.free -= (pages - self._held[index]).sum(axis=0)
        self._held[index] = pages

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free and held pages make up the pools."""
        held = self._held.sum(axis=0)
        if (held + self.free != self.pages).any() or (self.free < 0).any():
            raise IntegrityError(f"{held} held + {self.free} free are not {self.pages} pages")
        if self._held[self._unused].any():
            raise IntegrityError("a sequence that is gone holds pages")
