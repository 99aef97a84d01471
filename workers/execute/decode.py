"""New tokens on their way through a shard's layers: a decode step, or a verification."""

from dataclasses import replace
from typing import Protocol

import torch

from workers.backends.interface import Attention, Backend
from workers.kv.pool import PagedBatch, PagedStep
from workers.model.config import ModelConfig
from workers.model.llama import LlamaStage
from workers.model.rope import Rope
from workers.schedule.step import Step


class Reach(Protocol):
    """What a step attends to beside what is on the device, once its queries are known."""

    def __call__(self, layer: int, query: torch.Tensor) -> PagedBatch:
        """What each row of ``query`` [rows, heads, head size] attends to too, in host memory."""
        ...


class DecodeAttend:
    """Attention of one new token a row; ``shares`` collects that to the newest ``tail`` tokens.

    Each layer's are fp32 [rows, tail], see ``Attended``.
    """

    def __init__(
        self, step: PagedStep, tail: int, attention: Attention, reach: Reach | None = None
    ) -> None:
        self._step, self._tail, self._attention, self._reach = step, tail, attention, reach
        self.shares: list[torch.Tensor] = []

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        batch = self._step.write(layer, kv)
        if self._reach is not None:
            batch = replace(batch, spilled=self._reach(layer, query))
        attended = self._attention.decode_attention(query, batch, self._tail)
        self.shares.append(attended.shares)
        return attended.out


class Decoder:
    """Takes rows that are fed behind what their sequences have through all layers of a shard."""

    def __init__(
        self, model: LlamaStage, config: ModelConfig, backend: Backend, rope: Rope, stored: torch.dtype
    ) -> None:
        """``stored``: the type of the rows of KV."""
        self._model, self._backend, self._rope = model, backend, rope
        self._fused = backend.fuse(model.weights(), config, stored)

    def run(
        self,
        step: Step,
        inputs: torch.Tensor,
        paged: PagedStep,
        tail: int = 0,
        reach: Reach | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a step with a row for each new token.

        Args:
            inputs: as the shard takes them, on its device.
            tail: newest tokens whose attention is wanted.
            reach: what is attended to too; it takes the layers one by one.

        Returns:
            Hidden states [rows, hidden], and the attention to those tokens, fp32 [layers, rows, tail].
        """
        rotation = self._rope.rotation(step.positions, step.rows_and_lengths)
        if self._fused and len(inputs) <= self._fused.max_rows and reach is None:
            return self._fused(self._model.embed(inputs), rotation, paged, tail)
        attend = DecodeAttend(paged, tail, self._backend, reach)
        hidden = self._model(inputs, rotation, attend)
        return hidden, torch.stack(attend.shares)
