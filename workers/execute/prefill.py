"""A prefill on its way through a shard's layers, a block of rows at a time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import cast

import numpy as np
import torch

from workers.backends.interface import Attention
from workers.execute.attend import LayerAttention
from workers.execute.blocks import blocks, finish
from workers.execute.prompt import Prompt
from workers.kv.entry import Positions
from workers.model.llama import LlamaLayer, LlamaStage
from workers.model.rope import Rotation
from workers.schedule.step import Step


class Prefill:
    """The prefill of one micro-batch.

    In each layer all rows attend, in order, so that those of the recent window, which score, come last.
    Then it is known which rows go on, and these pass through the rest of the layer. Both happen in blocks.
    Other work may run between two blocks; results do not depend on when it does.

    Attributes:
        hidden: [rows, hidden].
        rows: how many of them each sequence has; ``prune`` makes them fewer, and behind the model's last
            layer only the last row of each sequence is left.
        positions: input position of every row, int32.
    """

    def __init__(
        self,
        step: Step,
        prompts: Sequence[Prompt],
        rows: tuple[int, ...],
        positions: Positions,
        hidden: torch.Tensor,
        rotation: Rotation,
        model: LlamaStage,
        attention: Attention,
        block_rows: int,
    ) -> None:
        """``rows`` of each of ``prompts``; ``hidden`` is given away."""
        self.step, self.hidden, self.rows, self.positions = step, hidden, rows, positions
        self._prompts, self._rotation = prompts, rotation
        self._model, self._attention, self._block_rows = model, attention, block_rows
        self._blocks = self._run()

    def advance(self) -> bool:
        """Computes one more block; False once there is none left."""
        return next(self._blocks, False)

    def _run(self) -> Iterator[bool]:
        for index, module in enumerate(self._model.layers):
            layer = cast(LlamaLayer, module)
            is_last = index == len(self._model.layers) - 1 and self._model.head is not None
            for prompt in self._prompts:
                yield from (True for _ in prompt.begin(index))
            attention = LayerAttention(
                self._attention, self._prompts, index, layer.window, self.rows, self.positions, is_last
            )
            for block in blocks(len(self.hidden), self._block_rows):
                rotation = self._rotation_of(block)
                query, kv = layer.project(self.hidden[block], rotation)
                attention.attend(block, query, kv, rotation if layer.rotates else None)
                yield True
            survivors = self._keep(index, attention, is_last)
            attended = attention.out
            if tuple(map(len, survivors)) != self.rows:
                if not is_last:
                    yield from self._leave(index, layer, attention, survivors)
                alive = torch.cat(survivors)
                self.rows = tuple(map(len, survivors))
                self.positions = self.positions[alive.cpu().numpy()]
                self.hidden, self._rotation = self.hidden[alive], self._rotation_of(alive)
                attended = attended[alive]
            for _ in finish(layer, self.hidden, attended, self._block_rows):
                yield True
            if not is_last:
                for prompt in self._prompts:
                    yield from (True for _ in prompt.end(index))
        self._hand_on()

    def _rotation_of(self, rows: slice | torch.Tensor) -> Rotation:
        return self._rotation[0][rows], self._rotation[1][rows]

    def _keep(self, index: int, attention: "LayerAttention", is_last: bool) -> list[torch.Tensor]:
        """Stores what the layer keeps; returns each sequence's rows that go on, among all."""
        survivors = []
        for number, (prompt, (first, end)) in enumerate(zip(self._prompts, attention.spans, strict=True)):
            own = self.positions[first:end]
            keep = prompt.keep(index, own, attention.kv_of(number), attention.observers[number])
            if is_last:  # the next token comes from the last row alone
                keep = torch.arange(end - first - 1, end - first, device=keep.device)
            survivors.append(keep + first)
        return survivors

    def _leave(
        self, index: int, layer: LlamaLayer, attention: "LayerAttention", survivors: list[torch.Tensor]
    ) -> Iterator[bool]:
        """Lets rows that go no deeper pass through the layer, where that is wanted."""
        for prompt, span, alive in zip(self._prompts, attention.spans, survivors, strict=True):
            if not prompt.waits:
                continue
            rows = torch.arange(*span, device=alive.device)
            lost = rows[~torch.isin(rows, alive)]
            hidden = self.hidden[lost]
            for _ in finish(layer, hidden, attention.out[lost], self._block_rows):
                yield True
            prompt.leave(index, self.positions[lost.cpu().numpy()], hidden)

    def _hand_on(self) -> None:
        """Puts what goes to the next shard too before the rows of each sequence."""
        if self._model.head is not None:
            return
        parts, ends = [prompt.hand_on() for prompt in self._prompts], list(accumulate(self.rows, initial=0))
        if not any(parts):
            return
        positions, hidden = [], []
        for part, (first, end) in zip(parts, pairwise(ends), strict=True):
            before = [] if part is None else [part]
            both = [*before, (self.positions[first:end], self.hidden[first:end])]
            positions += [each for each, _ in both]
            hidden += [each for _, each in both]
        ahead = [0 if part is None else len(part[0]) for part in parts]
        self.rows = tuple(rows + more for rows, more in zip(self.rows, ahead, strict=True))
        self.positions, self.hidden = np.concatenate(positions), torch.cat(hidden)
