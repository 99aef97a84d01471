"""Recall "step": new tokens attend to the best of what their sequences have on the host too."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from workers.backends.interface import Attention
from workers.budget.pages import PAGE_TOKENS
from workers.device import select_rows, to_device
from workers.kv.cache import ShardCache
from workers.kv.pool import PagedBatch

# A new token attends to one of so many tokens on the host.
RECALLED_OF = 16


class BestOfHost:
    """The tokens on the host that queries match best, by the index of their keys: a ``Reach``."""

    def __init__(self, cache: ShardCache, sequences: Sequence[int], attention: Attention) -> None:
        """``sequences``: one for each row of a step; some of them have an index."""
        rows = [row for row, sequence in enumerate(sequences) if sequence in cache.device.keys]
        self._sequences = [sequences[row] for row in rows]
        # Those of the step that recall; None where all do.
        self._rows = torch.tensor(rows) if len(rows) < len(sequences) else None
        self._step_rows = len(sequences)
        self._host, self._attention = cache.host, attention
        self._index = cache.device.keys.batch(self._sequences)
        self._spilled = self._host.view(self._sequences, cache.layers)
        starts = torch.from_numpy(cache.starts(self._sequences, on_host=True))
        # A window ends what there is to choose from.
        self._starts = starts if starts.any() else None
        self._wanted = -(-(self._spilled.lengths - starts) // RECALLED_OF)
        self._most: list[int] = self._wanted.amax(dim=1).tolist()

    def __call__(self, layer: int, query: torch.Tensor) -> PagedBatch:
        spilled, wanted, most = self._spilled.batch(layer), self._wanted[layer], self._most[layer]
        if not most:
            return self._for_all_rows(spilled)
        counts = to_device(spilled.lengths, query.device)
        if self._rows is not None:
            query = query[to_device(self._rows, query.device)]
        shares = self._attention.indexed_shares(query, self._index.batch(layer), counts)
        if self._starts is not None:
            places = torch.arange(shares.shape[1], device=shares.device)
            unseen = places < to_device(self._starts[layer], shares.device)[:, None]
            shares = shares.masked_fill(unseen, -1)
        best = shares.topk(most, dim=1).indices.cpu()
        # Those of which fewer are wanted have anything behind them.
        best.masked_fill_(torch.arange(most) >= wanted[:, None], 0)
        best = functional.pad(best, (0, -most % PAGE_TOKENS))
        pages = spilled.pages.gather(1, best // PAGE_TOKENS).to(torch.int64)
        kv = select_rows(spilled.rows, (pages * PAGE_TOKENS + best % PAGE_TOKENS).view(-1))
        self._host.count_recalled(self._sequences, wanted.tolist()).wait_on_device()
        pages = torch.arange(len(kv) // PAGE_TOKENS, dtype=torch.int32).view(len(best), -1)
        return self._for_all_rows(PagedBatch(kv, pages, wanted))

    def _for_all_rows(self, batch: PagedBatch) -> PagedBatch:
        """``batch``, with nothing for the rows that do not recall."""
        if self._rows is None:
            return batch
        pages = batch.pages.new_zeros(self._step_rows, batch.pages.shape[1])
        lengths = batch.lengths.new_zeros(self._step_rows)
        pages[self._rows], lengths[self._rows] = batch.pages, batch.lengths
        return PagedBatch(batch.rows, pages, lengths)
