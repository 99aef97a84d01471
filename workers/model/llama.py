"""The part of a LLaMA that one shard hosts: a contiguous range of layers, on packed rows."""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from workers.model.config import ModelConfig
from workers.model.rope import Rotation, rotate


class Attend(Protocol):
    """Attention over the cache, and what the cache does with new keys and values."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends in ``layer``, counted from 0 within the shard.

        Args:
            query: [rows, heads, head size], rotated, as is ``key``.
            key: [rows, KV heads, head size], as is ``value``.

        Returns:
            The output [surviving rows, heads * head size], and which rows survive, int64; None if all.
        """


class RMSNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden), requires_grad=False)
        self._epsilon = config.norm_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


class LlamaLayer(nn.Module):
    """One decoder layer; the projections that read the same input are fused."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._heads = (config.heads, config.kv_heads, config.kv_heads)
        self._head_size = config.head_size
        width = config.heads * config.head_size
        self.input_norm = RMSNorm(config)
        self.qkv = nn.Linear(config.hidden, sum(self._heads) * config.head_size, bias=config.attention_bias)
        self.output = nn.Linear(width, config.hidden, bias=config.attention_bias)
        self.mlp_norm = RMSNorm(config)
        self.gate_up = nn.Linear(config.hidden, 2 * config.intermediate, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=config.mlp_bias)

    def forward(
        self, index: int, hidden: torch.Tensor, rotation: Rotation, attend: Attend
    ) -> tuple[torch.Tensor, Rotation]:
        """Runs the layer on ``hidden`` [rows, hidden]; returns the surviving rows of both.

        Halves of their own, so that what one needs is free before the other begins.
        """
        hidden, rotation = self._attention(index, hidden, rotation, attend)
        return hidden + self._mlp(hidden), rotation

    def _attention(
        self, index: int, hidden: torch.Tensor, rotation: Rotation, attend: Attend
    ) -> tuple[torch.Tensor, Rotation]:
        projected = self.qkv(self.input_norm(hidden)).view(len(hidden), -1, self._head_size)
        query, key, value = projected.split(self._heads, dim=1)
        attended, survivors = attend(index, rotate(query, rotation), rotate(key, rotation), value)
        if survivors is not None:
            hidden = hidden[survivors]
            rotation = (rotation[0][survivors], rotation[1][survivors])
        return hidden + self.output(attended), rotation

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        down: torch.Tensor = self.down(functional.silu(gate) * up)
        return down


class LlamaStage(nn.Module):
    """Layers ``first`` to ``end`` of the model, with the embedding before and the head behind."""

    def __init__(self, config: ModelConfig, first: int, end: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.hidden) if first == 0 else None
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(first, end))
        is_last = end == config.layers
        self.final_norm = RMSNorm(config) if is_last else None
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False) if is_last else None

    def forward(self, inputs: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """Runs the shard's layers.

        Args:
            inputs: token ids int64 [rows] in the first shard, else hidden states [rows, hidden].

        Returns:
            Hidden states [surviving rows, hidden], not yet normed.
        """
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        for index, layer in enumerate(self.layers):
            hidden, rotation = layer(index, hidden, rotation, attend)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 [rows, vocabulary] of the last shard's ``hidden`` [rows, hidden]."""
        assert self.final_norm is not None
        assert self.head is not None
        logits: torch.Tensor = self.head(self.final_norm(hidden))
        return logits.float()
