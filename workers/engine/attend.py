"""Where the model meets the cache in a step on a few rows, layer by layer."""

from collections.abc import Sequence

import torch

from workers.kernels.interface import Kernels
from workers.kv.cache import ShardCache
from workers.kv.pool import PagedStep


class DecodeAttend:
    """Attention of one new token a sequence; ``shares`` collects that to the newest ``tail`` tokens.

    Each layer's are fp32 [sequences, tail], see ``Kernels.decode_attention``.
    """

    def __init__(self, step: PagedStep, tail: int, kernels: Kernels) -> None:
        self._step, self.tail, self._kernels = step, tail, kernels
        self.shares: list[torch.Tensor] = []

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        self._step.write(layer, kv)
        attended, shares = self._kernels.decode_attention(query, self._step.batch(layer), self.tail)
        self.shares.append(shares)
        return attended


class RecallAttend(DecodeAttend):
    """As ``DecodeAttend``, but some sequences attend to the best of their tokens on the host too."""

    def __init__(
        self, cache: ShardCache, sequences: Sequence[int], step: PagedStep, tail: int, kernels: Kernels
    ) -> None:
        super().__init__(step, tail, kernels)
        self._cache, self._sequences = cache, sequences

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        attended = super().__call__(layer, query, kv)
        weight = torch.ones(1 if self.tail > 1 else 0, device=query.device)
        for row in self._cache.recalls(self._sequences):
            sequence, shares = self._sequences[row], self.shares[-1]
            own = query[row : row + 1]
            recalled = self._cache.recall(sequence, layer, query[row], max(0, self.tail - 1))
            known = min(self.tail - 1, len(recalled) - 1) if self.tail > 1 else 0
            attended[row], scores = self._kernels.prefill_attention(own, recalled, weight, known)
            shares[row] = 0
            if known:
                shares[row, -1 - known : -1] = scores
        return attended
