"""What a set of kernels can do."""

from typing import Protocol

import torch

from workers.kv.pool import PagedBatch
from workers.model.config import ModelConfig
from workers.model.rope import Rotation


class Kernels(Protocol):
    """The operations of a layer beside the attention of a prefill."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` [rows, size] times ``weight`` [columns, size] transposed, plus ``bias`` [columns]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """``x`` [rows, hidden] over its root mean square, times ``weight`` [hidden]."""
        ...

    def silu_product(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, of both side by side, [rows, 2 * size], given away: [rows, size]."""
        ...

    def rotate(
        self, projected: torch.Tensor, rotation: Rotation, heads: int, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits projections and rotates queries and keys.

        Args:
            projected: [rows, heads + 2 * KV heads, head size]: queries, keys, values.

        Returns:
            Queries [rows, heads, head size], and keys and values [rows, 2, KV heads, head size].
        """
        ...

    def decode_attention(
        self, query: torch.Tensor, batch: PagedBatch, tail: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query row a sequence, over that sequence's cache.

        Args:
            query: [sequences, heads, head size].
            tail: newest tokens whose attention is wanted.

        Returns:
            The output [sequences, heads * head size], and the attention to the newest ``tail`` tokens,
            averaged over heads, fp32 [sequences, tail], the newest last; 0 where a cache is shorter.
        """
        ...

    def decode_scratch_bytes(self, model: ModelConfig, sequences: int, itemsize: int) -> int:
        """The most that ``decode_attention`` allocates beside its results."""
        ...
