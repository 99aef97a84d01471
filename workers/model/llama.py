"""The part of a LLaMA that one shard hosts: a contiguous range of layers, on packed rows."""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import nn

from workers.model.config import ModelConfig
from workers.model.operations import HeadNorms, LayerWeights, Operations
from workers.model.rope import Rotation


class Attend(Protocol):
    """Attention over the cache, and what the cache does with new keys and values."""

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Attends in ``layer``, counted from 0 within the shard.

        Args:
            query: [rows, heads, head size], rotated.
            kv: keys, rotated, and values, [rows, 2, KV heads, head size].

        Returns:
            [rows, heads * head size].
        """


class RMSNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, size: int, epsilon: float, operations: Operations) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.epsilon, self._operations = epsilon, operations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._operations.rms_norm(x, self.weight, self.epsilon)


class Linear(nn.Linear):
    """A matrix product by the shard's backend."""

    def __init__(self, size: int, columns: int, bias: bool, operations: Operations) -> None:
        super().__init__(size, columns, bias=bias)
        self._operations = operations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._operations.linear(x, self.weight, self.bias)


class LlamaLayer(nn.Module):
    """One decoder layer; the projections that read the same input are fused.

    Attributes:
        window: the newest tokens that one attends to, itself among them; 0: all.
        gate: foresees which of its keys and values matter; None: it was not trained.
    """

    gate: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, config: ModelConfig, layer: int, operations: Operations) -> None:
        """``layer``: of the model."""
        super().__init__()
        self.window, self.rotates = config.window(layer), layer not in config.unrotated
        self._heads, self._kv_heads, self._head_size = config.heads, config.kv_heads, config.head_size
        self._operations = operations
        width = config.heads * config.head_size
        projected = (config.heads + 2 * config.kv_heads) * config.head_size
        self.input_norm = RMSNorm(config.hidden, config.norm_epsilon, operations)
        self.qkv = Linear(config.hidden, projected, config.attention_bias, operations)
        norms = (config.head_size, config.norm_epsilon, operations)
        self.query_norm = RMSNorm(*norms) if config.head_norms else None
        self.key_norm = RMSNorm(*norms) if config.head_norms else None
        self.output = Linear(width, config.hidden, config.output_bias, operations)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_epsilon, operations)
        self.gate_up = Linear(config.hidden, 2 * config.intermediate, config.mlp_bias, operations)
        self.down = Linear(config.intermediate, config.hidden, config.mlp_bias, operations)

    def weights(self) -> LayerWeights:
        """The layer's weights, as they lie in memory."""
        norms = self._head_norms
        return LayerWeights(
            *(self.input_norm.weight, self.qkv.weight, self.qkv.bias),
            *(None if norms is None else norms.query, None if norms is None else norms.key),
            *(self.output.weight, self.output.bias),
            *(self.mlp_norm.weight, self.gate_up.weight, self.gate_up.bias),
            *(self.down.weight, self.down.bias),
            rotates=self.rotates,
        )

    @property
    def output_weight(self) -> torch.Tensor:
        """What heads' outputs are multiplied with, [hidden, heads, head size]."""
        return self.output.weight.view(-1, self._heads, self._head_size)

    @property
    def _head_norms(self) -> HeadNorms | None:
        if self.query_norm is None or self.key_norm is None:
            return None
        return HeadNorms(self.query_norm.weight, self.key_norm.weight, self.query_norm.epsilon)

    def project(self, hidden: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and keys and values, of ``hidden`` [rows, hidden], as ``Attend`` takes them."""
        projected = self.qkv(self.input_norm(hidden)).view(len(hidden), -1, self._head_size)
        turned = rotation if self.rotates else None
        return self._operations.rotate(projected, turned, self._heads, self._kv_heads, self._head_norms)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        """Adds to ``hidden`` [rows, hidden] what the attention's output and the MLP come to."""
        hidden += self.output(attended)
        # Nested, so that gate and up are free before the last product.
        hidden += self.down(self._operations.silu_product(self.gate_up(self.mlp_norm(hidden))))


class LlamaStage(nn.Module):
    """Layers ``first`` to ``end`` of the model, with the embedding before and the head behind."""

    def __init__(self, config: ModelConfig, first: int, end: int, operations: Operations) -> None:
        super().__init__()
        self._operations, self._activations = operations, operations.activations
        self.embedding = nn.Embedding(config.vocabulary, config.hidden) if first == 0 else None
        self.layers = nn.ModuleList(LlamaLayer(config, layer, operations) for layer in range(first, end))
        is_last = end == config.layers
        norm = (config.hidden, config.norm_epsilon, operations)
        self.final_norm = RMSNorm(*norm) if is_last else None
        self.head = Linear(config.hidden, config.vocabulary, False, operations) if is_last else None

    def forward(self, inputs: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """Runs the shard's layers on rows that all go through all of them.

        Args:
            inputs: token ids int64 [rows] in the first shard, else hidden states [rows, hidden].

        Returns:
            Hidden states [rows, hidden], not yet normed.
        """
        hidden = self.embed(inputs).clone()
        for index, module in enumerate(self.layers):
            layer = cast(LlamaLayer, module)
            layer.finish(hidden, attend(index, *layer.project(hidden, rotation)))
        return hidden

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` as the first layer takes them: [rows, hidden]."""
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        return hidden.to(self._activations)

    def weights(self) -> list[LayerWeights]:
        """The weights of all layers, as they lie in memory."""
        return [cast(LlamaLayer, layer).weights() for layer in self.layers]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 [rows, vocabulary] of the last shard's ``hidden`` [rows, hidden]."""
        assert self.final_norm is not None
        assert self.head is not None
        return self._operations.logits(self.final_norm(hidden), self.head.weight)
