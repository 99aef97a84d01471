"""The device memory of a shard's KV cache: one pool of pages, shared by layers and sequences."""

from dataclasses import dataclass

import torch

from workers.budget.pages import PAGE_TOKENS, PageAllocator
from workers.device import select_rows, to_device


@dataclass(frozen=True)
class PagedBatch:
    """Where one layer's KV of several sequences lies.

    Attributes:
        rows: the pool, [rows, 2, KV heads, head size]; slot s of a sequence is row
            ``pages[s // 16] * 16 + s % 16``.
        pages: int32 [sequences, most pages]; beyond a sequence's own there is anything.
        lengths: tokens of each sequence, int32 [sequences].
        starts: the first of them that is attended to, int32 [sequences]; None: all are.
        spilled: what they have in host memory, if that is wanted too.
    """

    rows: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None
    spilled: "PagedBatch | None" = None

    def gather_all(
        self, start: int, end: int, longest: int, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of sequences ``start`` to ``end``, what is spilled behind, and which tokens are seen.

        [sequences, longest + most, 2, KV heads, head size] and bool [sequences, longest + most].
        """
        kv = self.gather(start, end, longest)
        there = self._seen(start, end, longest)
        if self.spilled is None or not most:
            return kv, there
        back = self.spilled.gather(start, end, most)
        own = self.spilled._seen(start, end, most)
        back, own = to_device(back, kv.device), to_device(own, kv.device)
        # Of a sequence that has none there may be anything.
        back.masked_fill_(~own[:, :, None, None, None], 0)
        return torch.cat((kv, back), dim=1), torch.cat((there, own), dim=1)

    def _seen(self, start: int, end: int, longest: int) -> torch.Tensor:
        slots = torch.arange(longest, device=self.lengths.device)
        seen = slots < self.lengths[start:end, None]
        return seen if self.starts is None else seen & (slots >= self.starts[start:end, None])

    def gather(self, start: int, end: int, longest: int) -> torch.Tensor:
        """A copy of sequences ``start`` to ``end``: [sequences, longest, 2, KV heads, head size].

        Beyond its length a sequence's first token is repeated: always its own, written memory.
        """
        slots = torch.arange(longest, device=self.pages.device)
        own = slots < self.lengths[start:end, None]
        pages = self.pages[start:end].to(torch.int64)
        index = pages[:, slots // PAGE_TOKENS] * PAGE_TOKENS + slots % PAGE_TOKENS
        index = torch.where(own, index, pages[:, :1] * PAGE_TOKENS)
        gathered = select_rows(self.rows, index.reshape(-1))
        return gathered.view(end - start, longest, *self.rows.shape[1:])


@dataclass(frozen=True)
class PagedLayers:
    """As ``PagedBatch``, of all layers: pages [layers, sequences, most], others [layers, sequences]."""

    rows: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None

    def batch(self, layer: int) -> PagedBatch:
        """Where the KV of one layer lies."""
        starts = None if self.starts is None else self.starts[layer]
        return PagedBatch(self.rows, self.pages[layer], self.lengths[layer], starts)


@dataclass(frozen=True)
class PagedStep:
    """Where the KV of several sequences lies that all get a new token, in every layer.

    Attributes:
        rows: the pool, [rows, 2, KV heads, head size].
        slots: row of the pool for the new token's KV, int64 [layers, sequences].
        pages: int32 [layers, sequences, most pages]; beyond a sequence's own there is anything.
        lengths: tokens of each sequence with the new one, int32 [layers, sequences].
        starts: the first of them that the new one attends to, int32 [layers, sequences]; None: all.
        spilled: what they have in host memory, if they attend to that too.

    A sequence may be there more than once, with several new tokens: each is written before any attends.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None
    spilled: PagedLayers | None = None

    def write(self, layer: int, kv: torch.Tensor) -> None:
        """Stores the new tokens' ``kv`` [sequences, 2, KV heads, head size] of one layer."""
        self.rows.index_copy_(0, self.slots[layer], kv)

    def batch(self, layer: int) -> PagedBatch:
        """Where the KV of one layer lies."""
        spilled = self.spilled.batch(layer) if self.spilled else None
        starts = None if self.starts is None else self.starts[layer]
        return PagedBatch(self.rows, self.pages[layer], self.lengths[layer], starts, spilled)


class KVPool:
    """Pages of 16 tokens; a token's row is its key and value, [2, KV heads, head size].

    The memory is not touched before it is written, so that unused pages cost nothing on a CPU.
    """

    def __init__(
        self, pages: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.allocator = PageAllocator(pages)
        self.rows = torch.empty((pages * PAGE_TOKENS, 2, kv_heads, head_size), dtype=dtype, device=device)
        self.page_bytes = page_bytes(kv_heads, head_size, dtype)

    @property
    def floats(self) -> torch.Tensor:
        """The same memory as fp32 [pages * page_bytes / 4], for pages that hold scores."""
        return self.rows.view(-1).view(torch.float32)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy of ``rows`` (int64, any shape): [*rows.shape, 2, KV heads, head size]."""
        flat = self.rows.index_select(0, rows.reshape(-1))
        return flat.view(*rows.shape, *self.rows.shape[1:])

    def write(self, rows: torch.Tensor, kv: torch.Tensor) -> None:
        """Overwrites ``rows`` (int64 [n]) with ``kv`` [n, 2, KV heads, head size]."""
        self.rows.index_copy_(0, rows, kv)


def page_bytes(kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page."""
    return PAGE_TOKENS * 2 * kv_heads * head_size * dtype.itemsize
