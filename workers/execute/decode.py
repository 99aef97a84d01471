"""New tokens on their way through a shard's layers: a decode step, or a verification."""

import numpy as np
import torch

from workers.backends.interface import Attention, Backend
from workers.device import to_device
from workers.kv.pool import PagedStep
from workers.model.config import ModelConfig
from workers.model.llama import LlamaStage
from workers.model.rope import Rope
from workers.schedule.step import Step


class DecodeAttend:
    """Attention of one new token a row; ``shares`` collects that to the newest ``tail`` tokens.

    Each layer's are fp32 [rows, tail], see ``Attention.decode_attention``.
    """

    def __init__(self, step: PagedStep, tail: int, attention: Attention) -> None:
        self._step, self._tail, self._attention = step, tail, attention
        self.shares: list[torch.Tensor] = []

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        self._step.write(layer, kv)
        attended, shares = self._attention.decode_attention(query, self._step.batch(layer), self._tail)
        self.shares.append(shares)
        return attended


class Decoder:
    """Takes rows that are fed behind what their sequences have through all layers of a shard."""

    def __init__(self, model: LlamaStage, config: ModelConfig, backend: Backend, rope: Rope) -> None:
        self._model, self._backend, self._rope = model, backend, rope
        self._fused = backend.fuse(model.weights(), config)

    def run(
        self, step: Step, inputs: torch.Tensor, paged: PagedStep, tail: int, attend: DecodeAttend | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a step with a row for each new token.

        Args:
            inputs: as the shard takes them, on its device.
            tail: newest tokens whose attention is wanted.
            attend: in place of the usual attention, layer by layer.

        Returns:
            Hidden states [rows, hidden], and the attention to those tokens, fp32 [layers, rows, tail].
        """
        rotation = self._rope.rotation(
            to_device(step.positions.astype(np.int64), inputs.device), _lengths(step)
        )
        if self._fused and len(inputs) <= self._fused.max_rows and attend is None:
            return self._fused(self._model.embed(inputs), rotation, paged, tail)
        attend = attend or DecodeAttend(paged, tail, self._backend)
        hidden = self._model(inputs, rotation, attend)
        return hidden, torch.stack(attend.shares)


def _lengths(step: Step) -> list[tuple[int, int]]:
    """Of each sequence, its rows, and its length behind them."""
    ends = np.cumsum(step.rows)
    return [(rows, int(step.positions[end - 1]) + 1) for rows, end in zip(step.rows, ends, strict=True)]
