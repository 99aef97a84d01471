"""Where the model meets the cache in a decode step, layer by layer."""

import torch

from workers.kernels.interface import Kernels
from workers.kv.pool import PagedStep


class DecodeAttend:
    """Attention of one new token a sequence; ``shares`` collects that to the newest ``tail`` tokens.

    Each layer's are fp32 [sequences, tail], see ``Kernels.decode_attention``.
    """

    def __init__(self, step: PagedStep, tail: int, kernels: Kernels) -> None:
        self._step, self._tail, self._kernels = step, tail, kernels
        self.shares: list[torch.Tensor] = []

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        self._step.write(layer, kv)
        attended, shares = self._kernels.decode_attention(query, self._step.batch(layer), self._tail)
        self.shares.append(shares)
        return attended
