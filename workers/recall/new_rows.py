"""KV of tokens that are verified, in the host's format, until it is on the host and the device."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from workers.budget.footprint import ShardLayout
from workers.budget.pages import PAGE_TOKENS
from workers.device import to_device
from workers.kv.cache import ShardCache
from workers.kv.pool import PagedStep
from workers.kv.rows import decode


def new_rows_bytes(layout: ShardLayout, sequences: int) -> int:
    """The memory of those of so many sequences."""
    return (layout.end - layout.first) * sequences * layout.host_page_bytes


class NewRows:
    """A page for each layer of each sequence, which their new tokens have room on.

    Attributes:
        paged: new tokens there, and what the host has before them.
    """

    def __init__(self, fed: Sequence[int], stored: PagedStep, cache: ShardCache) -> None:
        """
        Args:
            fed: the sequence of each new token; at most a page of each.
            stored: where they go on the device, and all that the host has.
        """
        self._stored, self._cache, self._counts = stored, cache, Counter(fed)
        like, device = cache.host.like, stored.rows.device
        shape = (cache.layers, len(self._counts), PAGE_TOKENS, *like.shape[1:])
        self._rows = torch.empty(shape, dtype=like.dtype, device=device)
        own = np.repeat(np.arange(len(self._counts)), list(self._counts.values()))
        places = np.concatenate([np.arange(count) for count in self._counts.values()])
        pages = np.arange(cache.layers)[:, None] * len(self._counts) + own
        windows = np.array(cache.windows)[:, None]
        starts = np.where(windows, np.maximum(places + 1 - windows, 0), 0)
        self.paged = PagedStep(
            self._rows.flatten(0, 2),
            to_device(pages * PAGE_TOKENS + places, device),
            to_device(pages[..., None].astype(np.int32), device),
            to_device(np.tile(places.astype(np.int32) + 1, (cache.layers, 1)), device),
            to_device(starts.astype(np.int32), device) if any(cache.windows) else None,
            spilled=stored.spilled,
        )

    def store(self) -> None:
        """Puts them where they belong."""
        for layer, slots in enumerate(self.paged.slots):
            self._stored.write(layer, decode(self.paged.rows[slots]))
        for number, (sequence, count) in enumerate(self._counts.items()):
            self._cache.mirror(sequence, self._rows[:, number, :count])
