"""The newest tokens of sequences in a finer format than the pool's, in pages of the pool."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.kv_format import RECENT_ROOM
from workers.budget.pages import PAGE_TOKENS
from workers.device import to_device
from workers.kv.page_table import Lengths
from workers.kv.pool import KVPool, PagedLayers
from workers.kv.rows import encode, head_size_of, row_dtype, row_format, row_shape

Tables = npt.NDArray[np.int32]


class RecentRows:
    """Each layer of a sequence has a ring of rows: that of the token at position p is p modulo its room.

    Tokens are in the pool too; what there is here is attended to in the place of that, see ``PagedBatch``.

    Attributes:
        rows: all of the pool's memory as such rows, [rows, 2, KV heads, width].
        rows_each: rows of the pool that a layer's ring takes.
    """

    def __init__(self, pool: KVPool, layers: int) -> None:
        form = row_format(pool.rows.dtype)
        self._pool, self._layers = pool, layers
        self._page_tokens, self._pages_each = form.recent_page_tokens, form.recent_pages
        self.rows_each = self._pages_each * PAGE_TOKENS
        dtype, kv_heads = row_dtype(form.recent), pool.rows.shape[2]
        shape = row_shape(kv_heads, head_size_of(pool.rows), dtype)
        memory = pool.rows.view(-1).view(dtype)
        stride = pool.page_bytes // self._page_tokens // dtype.itemsize
        count = memory.numel() // stride
        self.rows = memory.as_strided((count, *shape), (stride, shape[1] * shape[2], shape[2], 1))
        self._tables: dict[int, Tables] = {}

    def open(self, sequence: int) -> None:
        """Takes pages. Raises OutOfPagesError, changing nothing, when there are too few."""
        pages = self._pool.allocator.allocate(self._layers * self._pages_each, _name(sequence))
        self._tables[sequence] = pages.reshape(self._layers, self._pages_each)

    def close(self, sequence: int) -> None:
        """Gives the pages back."""
        self._pool.allocator.release(self._tables.pop(sequence).reshape(-1), _name(sequence))

    def rename(self, sequence: int, name: int) -> None:
        """Calls ``sequence`` by another name."""
        table = self._tables.pop(sequence)
        self._pool.allocator.hand_over(table.reshape(-1), _name(sequence), _name(name))
        self._tables[name] = table

    def pages(self, sequence: int) -> int:
        """Pages that ``sequence`` has here."""
        return self._tables[sequence].size

    def write(self, sequence: int, layer: int, first: int, kv: torch.Tensor) -> None:
        """Stores ``kv`` [n, 2, KV heads, head size] of the tokens from position ``first`` on in ``layer``.

        Of more than there is room for, the last alone may be given.
        """
        positions = np.arange(first, first + len(kv))
        rows = self._places(self._stacked([sequence] * len(kv)), positions)[layer]
        self.rows.index_copy_(0, to_device(rows, self.rows.device), encode(kv, self.rows.dtype))

    def slots(self, sequences: Sequence[int], positions: npt.NDArray[np.int64]) -> Lengths:
        """Rows for one token each of ``sequences``, int64 [layers, tokens]."""
        return self._places(self._stacked(sequences), positions)

    def batch(
        self, sequences: Sequence[int], positions: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> PagedLayers:
        """Where the newest tokens of sequences lie.

        Args:
            positions: of the newest of each, int64 [sequences].
            counts: how many of them there are, int64 [layers, sequences].
        """
        first = (positions - counts + 1) % RECENT_ROOM
        order = (first // self._page_tokens)[..., None] + np.arange(self._pages_each)
        pages = np.take_along_axis(self._stacked(sequences), order % self._pages_each, axis=2)
        starts = first % self._page_tokens
        own, ends, begins = map(self._on_device, (pages, starts + counts, starts))
        return PagedLayers(self.rows, own, ends, begins, self._page_tokens)

    def image(self, sequence: int, layer: int) -> torch.Tensor:
        """A copy of the pages of a layer, as so many ``rows_each`` of the pool."""
        return self._pool.read(self._pool_rows(sequence, layer))

    def restore(self, sequence: int, layer: int, image: torch.Tensor) -> None:
        """Overwrites the pages of a layer with what ``image`` returned."""
        self._pool.write(self._pool_rows(sequence, layer), image)

    def _on_device(self, array: npt.NDArray[np.integer]) -> torch.Tensor:
        return to_device(array.astype(np.int32), self.rows.device)

    def _pool_rows(self, sequence: int, layer: int) -> torch.Tensor:
        pages = self._tables[sequence][layer, :, None].astype(np.int64)
        rows = (pages * PAGE_TOKENS + np.arange(PAGE_TOKENS)).reshape(-1)
        return to_device(rows, self.rows.device)

    def _stacked(self, sequences: Sequence[int]) -> Tables:
        """The tables of sequences, int32 [layers, sequences, pages of each]."""
        return np.stack([self._tables[sequence] for sequence in sequences], axis=1)

    def _places(self, tables: Tables, positions: npt.NDArray[np.int64]) -> Lengths:
        """Rows of a token at one of ``positions`` of each of ``tables``, int64 [layers, tokens]."""
        places = positions % RECENT_ROOM
        index = np.broadcast_to((places // self._page_tokens)[:, None], (*tables.shape[:2], 1))
        pages = np.take_along_axis(tables, index, axis=2)[..., 0].astype(np.int64)
        rows: Lengths = pages * self._page_tokens + places % self._page_tokens
        return rows


def _name(sequence: int) -> tuple[int, str]:
    return sequence, "recent"
