"""What every sequence of a pipeline holds of each shard's pool, as known without asking the shards."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from workers.compression.plan import KeepPlan
from workers.kv.footprint import ShardLayout, index_rows, score_pages
from workers.kv.pages import IntegrityError, pages_for

Counts = npt.NDArray[np.int64]


class Ledger:
    """Pages that are held, or will be by the steps under way; counts as ``pages_held`` does, for many.

    Attributes:
        pages: the shards' pools, int64 [shards].
        free: those of them that nobody holds.
    """

    def __init__(self, shards: Sequence[ShardLayout], pages: Sequence[int], sequences: int) -> None:
        """For at most so many ``sequences``."""
        self.pages: Counts = np.array(pages)
        self.free = self.pages.copy()
        self._shards = tuple(shards)
        self._firsts = [shard.first for shard in shards]
        layers = shards[-1].end
        self._index: dict[Hashable, int] = {}
        self._unused = list(range(sequences - 1, -1, -1))
        self._held = np.zeros((sequences, len(shards)), dtype=np.int64)
        self._scores = np.zeros((sequences, len(shards)), dtype=np.int64)
        # Of the plans: tokens kept of the prompt and dropped of each chunk, by layer; window and chunk.
        self._kept = np.zeros((sequences, layers), dtype=np.int64)
        self._dropped = np.zeros((sequences, layers), dtype=np.int64)
        self._window = np.zeros(sequences, dtype=np.int64)
        self._chunk = np.ones(sequences, dtype=np.int64)
        self._drafts = np.zeros(sequences, dtype=np.int64)
        self._lag = np.zeros(sequences, dtype=np.int64)
        self._prompt = np.zeros(sequences, dtype=np.int64)
        self._indexes = np.zeros(sequences, dtype=bool)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as there may be."""
        return not self._unused

    def add(self, sequence: Hashable, plan: KeepPlan) -> None:
        """Takes ``sequence`` in, which holds nothing yet."""
        index = self._index[sequence] = self._unused.pop()
        self._scores[index] = [score_pages(plan, shard) for shard in self._shards]
        self._kept[index] = plan.kept
        generation = plan.generation
        self._dropped[index] = 0 if generation is None else generation.chunk - np.array(generation.keeps)
        self._window[index] = 0 if generation is None else generation.window
        self._chunk[index] = 1 if generation is None else generation.chunk
        self._drafts[index], self._lag[index] = plan.drafts, plan.lag
        self._prompt[index], self._indexes[index] = plan.prompt_tokens, plan.indexes

    def remove(self, sequence: Hashable) -> None:
        """Forgets ``sequence``; what it held is free."""
        self.hold([sequence], np.zeros((1, len(self.pages)), dtype=np.int64))
        self._unused.append(self._index.pop(sequence))

    def needs(self, sequences: Sequence[Hashable], fed: Sequence[int], more: Sequence[int] = ()) -> Counts:
        """Pages of each shard with ``fed`` generated tokens each, and ``more`` before they are compressed.

        int64 [sequences, shards].
        """
        index = [self._index[sequence] for sequence in sequences]
        generated = np.array(fed)
        compressed = generated - self._lag[index] - self._window[index]
        chunks = np.maximum(compressed, 0) // self._chunk[index]
        tokens = self._kept[index] + generated[:, None] - chunks[:, None] * self._dropped[index]
        coming = self._drafts[index] + (np.array(more) if more else 0)
        each = pages_for(tokens + coming[:, None])
        each += self._index_pages(index, generated, tokens)
        pages: Counts = np.add.reduceat(each, self._firsts, axis=1) + self._scores[index]
        return pages

    def _index_pages(self, index: Sequence[int], generated: Counts, tokens: Counts) -> Counts:
        """Of the keys that are not on the device, by layer, int64 [sequences, layers]."""
        spilled = (self._prompt[index] + generated)[:, None] - tokens
        pages: Counts = self._indexes[index][:, None] * pages_for(index_rows(spilled))
        return pages

    def needs_to_go_on(self, old: Hashable, generated: int, sequence: Hashable) -> Counts:
        """Pages of each shard while ``sequence`` takes over what ``old`` left, layer by layer.

        int64 [1, shards].
        """
        index, heir = self._index[old], self._index[sequence]
        compressed = max(0, generated - self._lag[index] - self._window[index])
        left = self._kept[index] + generated - compressed // self._chunk[index] * self._dropped[index]
        before = pages_for(left + self._drafts[index])
        after = pages_for(self._kept[heir] + self._drafts[heir])
        keys_before = self._index_pages([index], np.array([generated]), left[None])
        keys_after = self._index_pages([heir], np.array([0]), self._kept[heir][None])
        each = np.maximum(before, after)[None] + np.maximum(keys_before, keys_after)
        scores = np.maximum(self._scores[index], self._scores[heir])
        pages: Counts = np.add.reduceat(each, self._firsts, axis=1) + scores
        return pages

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
