"""What one sequence of a prefill has before its rows, and which of all its tokens stay."""

from collections.abc import Iterator
from typing import Protocol

import torch

from workers.backends.stopwatch import Stopwatch
from workers.budget.plan import KeepPlan
from workers.kv.cache import ShardCache
from workers.kv.entry import GatheredLayer, Positions
from workers.policies.select import keep_of_prompt


class Prompt(Protocol):
    """A sequence's side of a prefill, layer by layer, counted within the shard.

    Attributes:
        plan: what stays.
        past: what there is before the rows in the layer that has begun; None if they are the first.
        waits: hidden states of rows that go no further are wanted.
    """

    plan: KeepPlan
    past: GatheredLayer | None
    waits: bool

    def begin(self, layer: int) -> Iterator[None]:
        """Prepares a layer, in blocks between which other work may run."""
        ...

    def window(self, layer: int, rows: int) -> int:
        """How many of the newest of ``rows`` rows must score the others."""
        ...

    def keep(
        self, layer: int, positions: Positions, kv: torch.Tensor, scores: torch.Tensor | None
    ) -> torch.Tensor:
        """Stores what a layer keeps.

        Args:
            positions: input positions of the rows, int32 [rows].
            kv: of the past and the rows, [tokens, 2, KV heads, head size].
            scores: as ``window_scores``; None where nothing scored.

        Returns:
            The rows that go deeper, int64, ascending.
        """
        ...

    def leave(self, layer: int, positions: Positions, hidden: torch.Tensor) -> None:
        """Takes the rows that go no deeper, [rows, hidden], as they leave the layer; given away."""
        ...

    def end(self, layer: int) -> Iterator[None]:
        """Ends a layer that is not the model's last, in blocks between which other work may run."""
        ...

    def hand_on(self) -> tuple[Positions, torch.Tensor] | None:
        """What goes to the next shard before the rows: positions, and hidden states [rows, hidden]."""
        ...


class FreshPrompt:
    """A prompt that begins with its rows."""

    past: GatheredLayer | None = None

    def __init__(
        self, sequence: int, plan: KeepPlan, cache: ShardCache, first_layer: int, stopwatch: Stopwatch
    ) -> None:
        """``first_layer``: of the shard, in the model."""
        self.plan, self.waits = plan, plan.spills_hidden
        self._sequence, self._cache = sequence, cache
        self._first_layer, self._stopwatch = first_layer, stopwatch

    def begin(self, layer: int) -> Iterator[None]:
        return iter(())

    def window(self, layer: int, rows: int) -> int:
        by_scores = self.plan.recent + self.plan.sinks < self._kept(layer, rows) < rows
        return self.plan.recent if by_scores else 0

    def keep(
        self, layer: int, positions: Positions, kv: torch.Tensor, scores: torch.Tensor | None
    ) -> torch.Tensor:
        plan, rows = self.plan, len(kv)
        kept, every = self._kept(layer, rows), torch.arange(rows, device=kv.device)
        keep = None
        if kept < rows:
            with self._stopwatch.on("selection"):
                keep = keep_of_prompt(scores, rows, kept, plan.recent, plan.sinks, kv.device)
        prunes = plan.drops_hidden_states
        self._cache.store_prompt(self._sequence, layer, positions, kv, None if prunes else keep)
        return keep if prunes and keep is not None else every

    def leave(self, layer: int, positions: Positions, hidden: torch.Tensor) -> None:
        self._cache.hidden.spill(self._sequence, layer + 1, positions, hidden)

    def end(self, layer: int) -> Iterator[None]:
        return iter(())

    def hand_on(self) -> None:
        return None

    def _kept(self, layer: int, rows: int) -> int:
        """How many of ``rows`` rows stay: ``prune`` chooses for the next layer, others for this."""
        chosen = self._first_layer + layer + self.plan.drops_hidden_states
        return rows if chosen == len(self.plan.kept) else self.plan.kept[chosen]
