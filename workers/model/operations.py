"""The dense operations that a model is made of; who carries them out is a backend."""

from dataclasses import dataclass
from typing import Protocol

import torch

from workers.model.rope import Rotation


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights; products are [columns, size], norms [hidden], biases [columns].

    ``query_norm`` and ``key_norm``, where there are such, are [head size]; ``rotates``: by position.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    rotates: bool


@dataclass(frozen=True)
class HeadNorms:
    """Weights, [head size], of the norms of queries and keys, head by head."""

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


class Operations(Protocol):
    """What a layer does with its rows but attention.

    ``activations`` is the type of all rows that pass through; weights and KV may be of another.
    """

    activations: torch.dtype

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` [rows, size] times ``weight`` [columns, size] transposed, plus ``bias`` [columns]."""
        ...

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``linear`` without a bias, fp32: near ties are not rounded away."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """``x`` [rows, hidden] over its root mean square, times ``weight`` [hidden]."""
        ...

    def silu_product(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, of both side by side, [rows, 2 * size], given away: [rows, size]."""
        ...

    def rotate(
        self,
        projected: torch.Tensor,
        rotation: Rotation | None,
        heads: int,
        kv_heads: int,
        norms: HeadNorms | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits projections; norms queries and keys, where they are, and rotates them, where that is.

        Args:
            projected: [rows, heads + 2 * KV heads, head size]: queries, keys, values.

        Returns:
            Queries [rows, heads, head size], and keys and values [rows, 2, KV heads, head size].
        """
        ...
