"""Recall "step": new tokens attend to the best of what their sequences have on the host too."""

from collections.abc import Sequence

import torch

from workers.backends.interface import Attention
from workers.execute.decode import DecodeAttend
from workers.kv.cache import ShardCache
from workers.kv.pool import PagedStep


class RecallAttend(DecodeAttend):
    """As ``DecodeAttend``, but some sequences attend to the best of their tokens on the host too."""

    def __init__(
        self, cache: ShardCache, sequences: Sequence[int], step: PagedStep, tail: int, attention: Attention
    ) -> None:
        super().__init__(step, tail, attention)
        self._cache, self._sequences = cache, sequences

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        attended = super().__call__(layer, query, kv)
        weight = torch.ones(1 if self._tail > 1 else 0, device=query.device)
        for row in self._cache.recalls(self._sequences):
            sequence, shares = self._sequences[row], self.shares[-1]
            own = query[row : row + 1]
            recalled = self._cache.recall(sequence, layer, query[row], max(0, self._tail - 1))
            known = min(self._tail - 1, len(recalled) - 1) if self._tail > 1 else 0
            attended[row], scores = self._attention.prefill_attention(own, recalled, weight, known)
            shares[row] = 0
            if known:
                shares[row, -1 - known : -1] = scores
        return attended
