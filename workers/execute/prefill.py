"""A prefill on its way through a shard's layers, a block of rows at a time."""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import cast

import torch

from workers.backends.attention import window_weights
from workers.backends.interface import Backend
from workers.budget.footprint import ShardLayout
from workers.budget.plan import KeepPlan
from workers.execute.workspace import BLOCK_ROWS
from workers.kv.cache import ShardCache
from workers.model.llama import LlamaLayer, LlamaStage
from workers.model.rope import Rotation
from workers.policies.select import keep_of_prompt
from workers.schedule.step import Step


class Prefill:
    """The prefill of one micro-batch; chooses what each layer keeps.

    In each layer all rows attend, in order, so that those of the recent window, which score, come last.
    Then it is known which rows go on, and these pass through the rest of the layer. Both happen in blocks
    of BLOCK_ROWS. Other work may run between two blocks; results do not depend on when it does.

    Attributes:
        hidden: [rows, hidden].
        rows: how many of them each sequence has; ``prune`` makes them fewer, and behind the model's last
            layer only the last row of each sequence is left.
        positions: input position of every row, int32.
    """

    def __init__(
        self,
        step: Step,
        hidden: torch.Tensor,
        rotation: Rotation,
        model: LlamaStage,
        kernels: Backend,
        cache: ShardCache,
        layout: ShardLayout,
    ) -> None:
        """``hidden`` is given away."""
        self.step, self.hidden, self.rows, self.positions = step, hidden, step.rows, step.positions
        self._rotation, self._model, self._kernels = rotation, model, kernels
        self._cache, self._layout = cache, layout
        self._plans = [cache.plan(sequence) for sequence in step.sequences]
        self._blocks = self._run()

    def advance(self) -> bool:
        """Computes one more block; False once there is none left."""
        return next(self._blocks, False)

    def _run(self) -> Iterator[bool]:
        for index, module in enumerate(self._model.layers):
            layer = cast(LlamaLayer, module)
            windows = [
                self._window(plan, index, rows) for plan, rows in zip(self._plans, self.rows, strict=True)
            ]
            is_last = index == len(self._model.layers) - 1 and self._model.head is not None
            attention = LayerAttention(
                self._kernels, self._plans, self.rows, windows, is_last, self._before(index)
            )
            for block in blocks(len(self.hidden)):
                attention.attend(block, *layer.project(self.hidden[block], self._rotation_of(block)))
                yield True
            attended = self._keep(index, attention, is_last)
            for block in blocks(len(self.hidden)):
                layer.finish(self.hidden[block], attended[block])
                yield True

    def _before(self, index: int) -> torch.Tensor | None:
        """KV that the only sequence has before its rows; None: they are its first."""
        return None

    def _rotation_of(self, rows: slice | torch.Tensor) -> Rotation:
        return self._rotation[0][rows], self._rotation[1][rows]

    def _kept(self, plan: KeepPlan, index: int, rows: int) -> int:
        """How many of ``rows`` rows stay: ``prune`` chooses for the next layer, others for this."""
        layer = self._layout.first + index + plan.drops_hidden_states
        return rows if layer == len(plan.kept) else plan.kept[layer]

    def _window(self, plan: KeepPlan, index: int, rows: int) -> int:
        """How many of the newest rows must score the others."""
        by_scores = plan.recent + plan.sinks < self._kept(plan, index, rows) < rows
        return plan.recent if by_scores else 0

    def _keep(self, index: int, attention: "LayerAttention", is_last: bool) -> torch.Tensor:
        """Stores what the layer keeps, and drops rows that go no further; returns the others' output."""
        survivors, device = [], attention.kv.device
        for number, (plan, (first, end)) in enumerate(zip(self._plans, attention.spans, strict=True)):
            kept = self._kept(plan, index, end - first)
            keep = None
            if kept < end - first:
                with self._kernels.stopwatch.on("selection"):
                    keep = keep_of_prompt(
                        attention.scores[number], end - first, kept, plan.recent, plan.sinks, device
                    )
            prunes = plan.drops_hidden_states
            own = slice(first, end)
            self._cache.store_prompt(
                self.step.sequences[number],
                index,
                self.positions[own],
                attention.kv[own],
                None if prunes else keep,
            )
            if is_last:  # the next token comes from the last row alone
                keep = torch.arange(end - first - 1, end - first, device=device)
            elif keep is None or not prunes:
                keep = torch.arange(end - first, device=device)
            survivors.append(keep + first)
        return self._drop(index, attention.out, survivors, is_last)

    def _drop(
        self, index: int, out: torch.Tensor, survivors: list[torch.Tensor], is_last: bool
    ) -> torch.Tensor:
        """Lets only ``survivors``, of each sequence, go on; returns their ``out``."""
        rows = tuple(map(len, survivors))
        if rows == self.rows:
            return out
        alive = torch.cat(survivors)
        if not is_last:
            self._spill_hidden(index, out, alive)
        self.rows, self.positions = rows, self.positions[alive.cpu().numpy()]
        self.hidden, self._rotation = self.hidden[alive], self._rotation_of(alive)
        return out[alive]

    def _spill_hidden(self, index: int, out: torch.Tensor, alive: torch.Tensor) -> None:
        """Lets dropped rows pass through the layer, and keeps on the host what the next would have got."""
        ends = list(accumulate(self.rows, initial=0))
        for number, (sequence, plan) in enumerate(zip(self.step.sequences, self._plans, strict=True)):
            if not plan.spills_hidden:
                continue
            own = torch.arange(ends[number], ends[number + 1], device=alive.device)
            lost = own[~torch.isin(own, alive)]
            hidden = self._finished(index, self.hidden[lost], out[lost])
            self._cache.hidden.spill(sequence, index + 1, self.positions[lost.cpu().numpy()], hidden)

    def _finished(self, index: int, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """A few rows as they leave a layer, given its attention's output; ``hidden`` is given away."""
        layer = cast(LlamaLayer, self._model.layers[index])
        for block in blocks(len(hidden)):
            layer.finish(hidden[block], out[block])
        return hidden


class LayerAttention:
    """One layer's attention of whole prompts, fed with their rows in order.

    Attributes:
        spans: first and last row, excluded, of each sequence.
        kv: of what is before the rows, and of these, [tokens, 2, KV heads, head size].
        out: [rows, heads * head size].
        scores: per sequence, as ``window_scores``; None where nothing scores.
    """

    kv: torch.Tensor
    out: torch.Tensor

    def __init__(
        self,
        kernels: Backend,
        plans: list[KeepPlan],
        rows: tuple[int, ...],
        windows: list[int],
        last_rows: bool,
        before: torch.Tensor | None = None,
    ) -> None:
        """``windows``: each sequence's rows that score. ``last_rows``: output of others is not needed.

        ``before``: KV that the only sequence has before its rows.
        """
        self._kernels, self._plans, self._windows, self._last_rows = kernels, plans, windows, last_rows
        self.spans = list(pairwise(accumulate(rows, initial=0)))
        self.scores: list[torch.Tensor | None] = [None] * len(plans)
        self._before, self._past = before, 0 if before is None else len(before)

    def attend(self, block: slice, query: torch.Tensor, kv: torch.Tensor) -> None:
        """Takes in the ``query`` and ``kv`` of the next rows."""
        if block.start == 0:
            total = self.spans[-1][1]
            self.kv = kv.new_empty(self._past + total, *kv.shape[1:])
            if self._before is not None:
                self.kv[: self._past] = self._before
            self.out = query.new_empty(total, query[0].numel())
        self.kv[self._past + block.start : self._past + block.stop] = kv
        for number, (first, end) in enumerate(self.spans):
            window = self._windows[number]
            begin, stop = max(first, block.start), min(end, block.stop)
            if self._last_rows:
                begin = max(begin, end - max(1, window))
            if begin >= stop:
                continue
            # Of the window's rows, those in this block.
            scoring = max(0, stop - max(begin, end - window))
            newest = window - (end - stop)
            weights = window_weights(window, self._plans[number].distance_weight, kv.device)
            self.out[begin:stop], scores = self._kernels.prefill_attention(
                query[begin - block.start : stop - block.start],
                self.kv[first : self._past + stop],
                weights[max(0, newest - scoring) : max(0, newest)],
                self._past + end - window - first if scoring else 0,
            )
            if scoring:
                so_far = self.scores[number]
                self.scores[number] = scores if so_far is None else so_far + scores


def blocks(rows: int) -> Iterator[slice]:
    """Cuts ``rows`` rows into blocks."""
    for start in range(0, rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, rows))
