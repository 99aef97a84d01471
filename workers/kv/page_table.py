"""Where the KV of sequences lies: per sequence and layer, its pages in order and its length."""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from workers.budget.pages import PAGE_TOKENS, IntegrityError, PageAllocator, pages_for

Rows = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int64]


class PageTables:
    """The page tables of all sequences of a pool, each layer of each with a length of its own.

    Layers count from 0 within the shard. Slot s of a layer is token s of its cache and lies at row
    ``page[s // 16] * 16 + s % 16`` of the pool. Tables are int32 arrays that are changed in place.

    Attributes:
        sequences, max_tokens: how many sequences, and tokens in a layer of each, there may be.
    """

    def __init__(self, allocator: PageAllocator, sequences: int, layers: int, max_tokens: int) -> None:
        self.allocator, self.sequences, self.max_tokens = allocator, sequences, max_tokens
        self._index: dict[Hashable, int] = {}
        self._unused = list(range(sequences - 1, -1, -1))
        self._lengths = np.zeros((sequences, layers), dtype=np.int32)
        self._pages = np.zeros((sequences, layers, pages_for(max_tokens)), dtype=np.int32)

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of one sequence's table."""
        return int(self._pages[0].nbytes + self._lengths[0].nbytes)

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._index

    def open(self, sequence: Hashable) -> None:
        """Gives ``sequence`` an empty table."""
        self._index[sequence] = self._unused.pop()

    def close(self, sequence: Hashable) -> None:
        """Gives all pages of ``sequence`` back, and its table."""
        self.resize_layers(sequence, 0, np.zeros(self._lengths.shape[1], dtype=np.int64))
        self._unused.append(self._index.pop(sequence))

    def rename(self, sequence: Hashable, name: Hashable) -> None:
        """Calls ``sequence`` by another name."""
        self.allocator.hand_over(self._own_pages(sequence), sequence, name)
        self._index[name] = self._index.pop(sequence)

    def lengths(self, sequence: Hashable) -> Lengths:
        """Tokens in every layer of ``sequence``."""
        lengths: Lengths = self._lengths[self._index[sequence]].astype(np.int64)
        return lengths

    def length(self, sequence: Hashable, layer: int) -> int:
        """Tokens in ``layer`` of ``sequence``."""
        return int(self._lengths[self._index[sequence], layer])

    def pages_of(self, sequence: Hashable) -> int:
        """Pages that ``sequence`` owns."""
        return sum(map(pages_for, self._lengths[self._index[sequence]].tolist()))

    def resize(self, sequence: Hashable, layer: int, length: int) -> None:
        """Makes ``layer`` hold ``length`` tokens, taking or giving back pages at its end.

        Raises OutOfPagesError and changes nothing when the pool has too few free pages.
        """
        self.resize_layers(sequence, layer, np.array([length]))

    def resize_layers(self, sequence: Hashable, first: int, lengths: Lengths) -> None:
        """Makes the layers from ``first`` on hold ``lengths`` tokens, int64, as ``resize`` does."""
        index = self._index[sequence]
        layers = slice(first, first + len(lengths))
        have, want = pages_for(self._lengths[index, layers].astype(np.int64)), pages_for(lengths)
        new = self.allocator.allocate(int(np.maximum(want - have, 0).sum()), sequence)
        for layer in np.flatnonzero(want != have):
            table, before, after = self._pages[index, first + layer], have[layer], want[layer]
            if after > before:
                table[before:after], new = new[: after - before], new[after - before :]
            else:
                self.allocator.release(table[after:before], sequence)
        self._lengths[index, layers] = lengths

    def extend(self, sequences: Sequence[Hashable]) -> Rows:
        """Adds one slot to every layer of each sequence.

        Returns their rows of the pool, int64 [layers, sequences]. Raises OutOfPagesError and changes
        nothing when the pool has too few free pages.
        """
        index = np.array([self._index[sequence] for sequence in sequences])
        lengths = self._lengths[index]
        full = lengths % PAGE_TOKENS == 0
        self.allocator.require(int(full.sum()))
        for row in np.flatnonzero(full.any(axis=1)):
            layers = np.flatnonzero(full[row])
            pages = self.allocator.allocate(len(layers), sequences[int(row)])
            self._pages[index[row], layers, lengths[row, layers] // PAGE_TOKENS] = pages
        self._lengths[index] = lengths + 1
        layers = np.arange(lengths.shape[1])
        pages = self._pages[index[:, None], layers, lengths // PAGE_TOKENS].astype(np.int64)
        rows: Rows = pages * PAGE_TOKENS + lengths % PAGE_TOKENS
        return np.ascontiguousarray(rows.T)

    def rows(self, sequence: Hashable, layer: int, start: int, end: int) -> Rows:
        """Rows of the pool with slots ``start`` to ``end`` of ``layer``, int64 [end - start]."""
        return self.rows_of_layers(sequence, layer, np.array([start]), np.array([end]))

    def rows_of_layers(self, sequence: Hashable, first: int, starts: Lengths, ends: Lengths) -> Rows:
        """Rows with slots ``starts`` to ``ends`` of the layers from ``first`` on, one behind the other."""
        counts = ends - starts
        layers = np.repeat(np.arange(first, first + len(counts)), counts)
        slots = np.arange(len(layers)) + np.repeat(ends - counts.cumsum(), counts)
        pages = self._pages[self._index[sequence], layers, slots // PAGE_TOKENS]
        rows: Rows = pages.astype(np.int64) * PAGE_TOKENS + slots % PAGE_TOKENS
        return rows

    def batch(self, sequences: Sequence[Hashable]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Pages of every layer of several sequences, and their lengths.

        Returns int32 [layers, sequences, most pages] and int32 [layers, sequences]. What lies beyond
        the pages of a sequence is left over from others and must not be looked up.
        """
        index = np.array([self._index[sequence] for sequence in sequences])
        lengths = self._lengths[index]
        pages = self._pages[index, :, : pages_for(int(lengths.max()))]
        return np.ascontiguousarray(pages.swapaxes(0, 1)), np.ascontiguousarray(lengths.T)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless a sequence's tables have the pages that it owns, each once."""
        self.allocator.check_integrity()
        for sequence in self._index:
            pages = self._own_pages(sequence).tolist()
            if sorted(pages) != sorted(self.allocator.pages_of(sequence)):
                raise IntegrityError(f"sequence {sequence!r} does not own the pages of its tables")
        if stray := self._lengths[self._unused].any(axis=1).sum():
            raise IntegrityError(f"{stray} unused tables are not empty")

    def _own_pages(self, sequence: Hashable) -> npt.NDArray[np.int32]:
        index = self._index[sequence]
        own = np.arange(self._pages.shape[2]) < pages_for(self._lengths[index].astype(np.int64))[:, None]
        pages: npt.NDArray[np.int32] = self._pages[index][own]
        return pages
