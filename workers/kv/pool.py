"""The device memory of a shard's KV cache: one pool of pages, shared by layers and sequences."""

import torch

from workers.kv.pages import PAGE_TOKENS, PageAllocator


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
