"""The device memory of a shard's KV cache: one pool of pages, shared by layers and sequences."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.budget.pages import PAGE_TOKENS, PageAllocator
from workers.device import select_rows, to_device
from workers.kv.rows import decode, encode, row_format, row_shape


@dataclass(frozen=True)
class PagedBatch:
    """Where one layer's KV of several sequences lies.

    Attributes:
        rows: the pool, see ``workers.kv.rows``, [rows, 2, KV heads, width]; slot s of a sequence is row
            ``pages[s // 16] * 16 + s % 16``.
        pages: int32 [sequences, most pages]; beyond a sequence's own there is anything.
        lengths: tokens of each sequence, int32 [sequences].
        starts: the first of them that is attended to, int32 [sequences]; None: all are.
        spilled: what they have in host memory, if that is wanted too.
        recent: their newest tokens once more, in a finer format, attended to in the place of those.
        page_tokens: slots of a page.
    """

    rows: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None
    spilled: "PagedBatch | None" = None
    recent: "PagedBatch | None" = None
    page_tokens: int = PAGE_TOKENS

    def gather_all(
        self, start: int, end: int, longest: int, most: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of sequences ``start`` to ``end``, what is spilled behind, and which tokens are seen.

        [sequences, longest + most, 2, KV heads, head size], in ``dtype``, and bool for each token.
        """
        kv = decode(self.gather(start, end, longest), dtype).to(dtype)
        if self.recent is not None:
            finer = decode(self.recent.gather(start, end, int(self.recent.lengths.max())), dtype).to(dtype)
            rows, places = self.recent._seen(start, end, finer.shape[1]).nonzero(as_tuple=True)
            behind = (self.lengths - self.recent.lengths)[start:end].to(torch.int64)
            kv[rows, behind[rows] + places] = finer[rows, places]
        there = self._seen(start, end, longest)
        if self.spilled is None or not most:
            return kv, there
        back = self.spilled.gather(start, end, most)
        own = self.spilled._seen(start, end, most)
        back, own = decode(to_device(back, kv.device), dtype).to(dtype), to_device(own, kv.device)
        # Of a sequence that has none there may be anything.
        back.masked_fill_(~own[:, :, None, None, None], 0)
        return torch.cat((kv, back), dim=1), torch.cat((there, own), dim=1)

    def _seen(self, start: int, end: int, longest: int) -> torch.Tensor:
        slots = torch.arange(longest, device=self.lengths.device)
        seen = slots < self.lengths[start:end, None]
        return seen if self.starts is None else seen & (slots >= self.starts[start:end, None])

    def gather(self, start: int, end: int, longest: int) -> torch.Tensor:
        """A copy of rows of sequences ``start`` to ``end``: [sequences, longest, 2, KV heads, width].

        Beyond its length a sequence's first token is repeated: always its own, written memory.
        """
        slots = torch.arange(longest, device=self.pages.device)
        own = slots < self.lengths[start:end, None]
        pages = self.pages[start:end].to(torch.int64)
        index = pages[:, slots // self.page_tokens] * self.page_tokens + slots % self.page_tokens
        index = torch.where(own, index, pages[:, :1] * self.page_tokens)
        gathered = select_rows(self.rows, index.reshape(-1))
        return gathered.view(end - start, longest, *self.rows.shape[1:])


@dataclass(frozen=True)
class PagedLayers:
    """As ``PagedBatch``, of all layers: pages [layers, sequences, most], others [layers, sequences]."""

    rows: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None
    page_tokens: int = PAGE_TOKENS

    def batch(self, layer: int) -> PagedBatch:
        """Where the KV of one layer lies."""
        starts = None if self.starts is None else self.starts[layer]
        place = (self.rows, self.pages[layer], self.lengths[layer], starts)
        return PagedBatch(*place, page_tokens=self.page_tokens)


@dataclass(frozen=True)
class PagedStep:
    """Where the KV of several sequences lies that all get a new token, in every layer.

    Attributes:
        rows: the pool, [rows, 2, KV heads, width].
        slots: row of the pool for the new token's KV, int64 [layers, sequences].
        pages: int32 [layers, sequences, most pages]; beyond a sequence's own there is anything.
        lengths: tokens of each sequence with the new one, int32 [layers, sequences].
        starts: the first of them that the new one attends to, int32 [layers, sequences]; None: all.
        spilled: what they have in host memory, if they attend to that too.
        recent: their newest tokens in a finer format, the new ones among them, if there is one.
        recent_slots: as ``slots``, for the rows of that.

    A sequence may be there more than once, with several new tokens: each is written before any attends.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None = None
    spilled: PagedLayers | None = None
    recent: PagedLayers | None = None
    recent_slots: torch.Tensor | None = None
    page_tokens: ClassVar[int] = PAGE_TOKENS

    def write(self, layer: int, kv: torch.Tensor) -> PagedBatch:
        """Stores new tokens' ``kv`` [sequences, 2, KV heads, head size] of a layer; says where all lies."""
        self.rows.index_copy_(0, self.slots[layer], encode(kv, self.rows.dtype))
        if self.recent is not None and self.recent_slots is not None:
            finer = encode(kv, self.recent.rows.dtype)
            self.recent.rows.index_copy_(0, self.recent_slots[layer], finer)
        starts = None if self.starts is None else self.starts[layer]
        spilled = self.spilled.batch(layer) if self.spilled else None
        recent = self.recent.batch(layer) if self.recent else None
        return PagedBatch(self.rows, self.pages[layer], self.lengths[layer], starts, spilled, recent)


class KVPool:
    """Pages of 16 tokens; a token's row is its key and value, see ``workers.kv.rows``.

    The memory is not touched before it is written, so that unused pages cost nothing on a CPU.
    """

    def __init__(
        self, pages: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.allocator = PageAllocator(pages)
        shape = row_shape(kv_heads, head_size, dtype)
        self.rows = torch.empty((pages * PAGE_TOKENS, *shape), dtype=dtype, device=device)
        self.page_bytes = row_format(dtype).page_bytes(kv_heads, head_size)
        self._parts = torch.arange(2 * kv_heads, device=device).view(2, kv_heads)  # of a row, in order

    @property
    def floats(self) -> torch.Tensor:
        """The same memory as fp32 [pages * page_bytes / 4], for pages that hold scores."""
        return self.rows.view(-1).view(torch.float32)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy of ``rows`` (int64, any shape): [*rows.shape, 2, KV heads, width]."""
        flat = self.rows.index_select(0, rows.reshape(-1))
        return flat.view(*rows.shape, *self.rows.shape[1:])

    def read_sets(self, rows: torch.Tensor) -> torch.Tensor:
        """As ``read``, of ``rows`` int64 [n, sets], where a set is of all KV heads, or each of one."""
        if rows.shape[1] == 1:
            return self.read(rows[:, 0])
        places = rows[:, None] * self._parts.numel() + self._parts
        flat = self.rows.view(-1, self.rows.shape[-1]).index_select(0, places.view(-1))
        return flat.view(*places.shape, -1)

    def write(self, rows: torch.Tensor, new: torch.Tensor) -> None:
        """Overwrites ``rows`` (int64 [n]) with ``new`` ones [n, 2, KV heads, width]."""
        self.rows.index_copy_(0, rows, new)
