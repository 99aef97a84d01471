"""The prefill of a sequence that goes on with what an earlier turn left."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional

from workers.budget.plan import KeepPlan
from workers.device import to_device
from workers.execute.prefill import LayerAttention, Prefill, blocks
from workers.kv.entry import GatheredLayer, Positions
from workers.model.llama import LlamaLayer
from workers.model.rope import Rotation
from workers.policies.select import keep_of_prompt

Rotate = Callable[[Positions], Rotation]


@dataclass(frozen=True)
class Lifted:
    """Rows of an earlier turn that ``prune`` had dropped, on their way through deeper layers.

    Attributes:
        positions: int32 [rows], ascending.
        hidden: [rows, hidden].
    """

    positions: Positions
    hidden: torch.Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, rows: int) -> "Lifted":
        """The first of them."""
        return Lifted(self.positions[:rows], self.hidden[:rows])

    def joined(self, positions: Positions, hidden: torch.Tensor) -> "Lifted":
        """With more rows, in order of positions."""
        positions = np.concatenate([self.positions, positions])
        order = positions.argsort()
        hidden = torch.cat([self.hidden, hidden.to(self.hidden)])[to_device(order, hidden.device)]
        return Lifted(positions[order], hidden)


class Continuation(Prefill):
    """The prefill of a turn that goes on with what earlier turns left.

    Each layer's new rows attend to what there is of the past on the device and, with recall, on the host;
    then it is chosen anew, by the new rows of the recent window, what of all that stays on the device.

    With ``prune``, new rows that are not chosen go no deeper. With recall, rows that it dropped in earlier
    turns are lifted: from the layer before which they wait, they go with the new rows through all that
    follow, and get the keys and values that they lack. So a second turn does what the first one saved.
    """

    def __init__(self, *arguments: Any, recall: bool, reused: int, rotate: Rotate) -> None:
        """``arguments`` as for ``Prefill``.

        Args:
            recall: what is on the host comes back.
            reused: tokens of the past; rows before that come lifted from the shard before.
            rotate: rotations of lifted rows.
        """
        super().__init__(*arguments)
        self._recall, self._rotate = recall, rotate
        (self._sequence,) = self.step.sequences
        rows = int((self.positions < reused).sum())
        self._lifted = Lifted(self.positions[:rows], self.hidden[:rows].clone())
        self._lost = self._lifted.first(0)
        self.hidden, self.positions = self.hidden[rows:], self.positions[rows:]
        self.rows = (len(self.positions),)
        self._rotation = self._rotation_of(slice(rows, None))

    def _run(self) -> Iterator[bool]:
        yield from super()._run()
        if self._plans[0].spills_hidden and self._model.head is None:
            self._take_up(len(self._model.layers))
            self.hidden = torch.cat([self._lifted.hidden, self.hidden])
            self.positions = np.concatenate([self._lifted.positions, self.positions])
            self.rows = (len(self.positions),)

    def _before(self, index: int) -> torch.Tensor:
        return self._past.kv

    def _window(self, plan: KeepPlan, index: int, rows: int) -> int:
        self._past = self._cache.gather(self._sequence, index, self._recall)
        if plan.spills_hidden:
            self._lift(index)
        tokens = len(self._past.positions) + rows
        by_scores = plan.recent + plan.sinks < plan.kept[self._layout.first + index] < tokens
        return min(plan.recent, rows) if by_scores else 0

    def _lift(self, index: int) -> None:
        """Puts keys and values of lifted rows, also of those that wait before the layer, in the past."""
        self._take_up(index)
        lifted, past = self._lifted, self._past
        if not len(lifted):
            return
        layer = cast(LlamaLayer, self._model.layers[index])
        parts = [
            layer.project(lifted.hidden[block], self._rotate(lifted.positions[block]))
            for block in blocks(len(lifted))
        ]
        query, kv = (torch.cat(part) for part in zip(*parts, strict=True))
        positions = np.concatenate([past.positions, lifted.positions])
        order = positions.argsort()
        places = np.concatenate([past.places, np.full(len(lifted), -1)])
        merged = torch.cat([past.kv, kv])[to_device(order, kv.device)]
        self._past = GatheredLayer(positions[order], places[order], merged)
        self._lifted_out = _attend(query, lifted.positions, self._past)

    def _take_up(self, index: int) -> None:
        """Lifts what waits before a layer; what the layer before has dropped waits there from now on."""
        waiting = self._cache.hidden.take(self._sequence, index)
        if waiting is not None:
            self._lifted = self._lifted.joined(*waiting)
        self._cache.hidden.spill(self._sequence, index, self._lost.positions, self._lost.hidden)
        self._lost = self._lost.first(0)

    def _keep(self, index: int, attention: LayerAttention, is_last: bool) -> torch.Tensor:
        (plan,), (rows,), (scores,) = self._plans, self.rows, attention.scores
        past, device = len(self._past.positions), attention.kv.device
        kept = min(plan.kept[self._layout.first + index], past + rows)
        keep = torch.arange(past + rows, device=device)
        if kept < past + rows:
            recent = kept - min(plan.sinks, kept) if scores is None else min(plan.recent, rows)
            with self._kernels.stopwatch.on("selection"):
                keep = keep_of_prompt(scores, past + rows, kept, recent, plan.sinks, device)
        tokens = GatheredLayer(
            np.concatenate([self._past.positions, self.positions]),
            np.concatenate([self._past.places, np.full(rows, -1)]),
            attention.kv,
        )
        self._cache.replace(self._sequence, index, tokens, keep)
        if len(self._lifted) and not is_last:
            hidden = self._finished(index, self._lifted.hidden, self._lifted_out)
            self._lifted = Lifted(self._lifted.positions, hidden)
        survivors = torch.arange(rows, device=device)
        if is_last:  # the next token comes from the last row alone
            survivors = survivors[-1:]
        elif plan.drops_hidden_states:
            survivors = keep[keep >= past] - past
        return self._drop(index, attention.out, [survivors], is_last)

    def _spill_hidden(self, index: int, out: torch.Tensor, alive: torch.Tensor) -> None:
        # They wait before the next layer, but not for this turn.
        if self._plans[0].spills_hidden:
            lost = torch.ones(len(out), dtype=torch.bool, device=out.device)
            lost[alive] = False
            hidden = self._finished(index, self.hidden[lost], out[lost])
            self._lost = self._lost.joined(self.positions[lost.cpu().numpy()], hidden)


def _attend(query: torch.Tensor, positions: Positions, past: GatheredLayer) -> torch.Tensor:
    """Attention of rows at ``positions`` to all of ``past`` that is not behind them.

    ``query`` is [rows, heads, head size]; returns [rows, heads * head size].
    """
    visible = to_device(past.positions[None] <= positions[:, None], query.device)
    key, value = past.kv.to(query.dtype).unbind(1)
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=visible,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)
