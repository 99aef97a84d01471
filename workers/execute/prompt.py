"""What one sequence of a prefill has before its rows, and which of all its tokens stay."""

from collections.abc import Callable, Iterator
from typing import Protocol, cast

import numpy as np
import torch

from workers.backends.stopwatch import Stopwatch
from workers.budget.plan import KeepPlan
from workers.device import to_device
from workers.execute.choice import Chooser, on_host
from workers.execute.observe import LayerObserver
from workers.kv.cache import ShardCache
from workers.kv.entry import GatheredLayer, Positions
from workers.kv.score_pages import Indices
from workers.model.llama import LlamaLayer, LlamaStage
from workers.model.rope import Rotation
from workers.policies.floors import Floors
from workers.policies.observed import Observed, ends, over_heads

Rotate = Callable[[Positions], Rotation]


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

    def observer(self, layer: int, rows: int) -> LayerObserver:
        """What must be looked at in a layer of ``rows`` rows."""
        ...

    def keep(
        self, layer: int, positions: Positions, kv: torch.Tensor, observer: LayerObserver
    ) -> torch.Tensor:
        """Stores what a layer keeps.

        Args:
            positions: input positions of the rows, int32 [rows].
            kv: of the past and the rows, [tokens, 2, KV heads, head size].
            observer: which has seen all rows.

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
        self,
        sequence: int,
        plan: KeepPlan,
        cache: ShardCache,
        model: LlamaStage,
        first_layer: int,
        choose: Chooser,
        rotate: Rotate,
        stopwatch: Stopwatch,
    ) -> None:
        """
        Args:
            first_layer: of the shard, in the model.
            rotate: rotations of positions.
        """
        self.plan, self.waits = plan, plan.spills_hidden
        self._sequence, self._cache, self._model, self._choose = sequence, cache, model, choose
        self._first_layer, self._rotate, self._stopwatch = first_layer, rotate, stopwatch

    def begin(self, layer: int) -> Iterator[None]:
        return iter(())

    def observer(self, layer: int, rows: int) -> LayerObserver:
        plan, kept = self.plan, self._kept(layer, rows)
        return layer_observer(plan, rows, 0, kept < rows and plan.chooses(kept), plan.recent)

    def keep(
        self, layer: int, positions: Positions, kv: torch.Tensor, observer: LayerObserver
    ) -> torch.Tensor:
        plan, rows = self.plan, len(kv)
        kept = self._kept(layer, rows)
        keep = None
        if kept < rows:
            with self._stopwatch.on("selection"):
                own = cast(LlamaLayer, self._model.layers[layer])
                floors = self._choose.floors(positions[None], kv.device)
                seen = observed(plan, plan.recent, observer, kv, own, rows, self._rotate, floors)
                keep = choose_kept(self._choose, plan, seen, plan.sets(kv.shape[2]), rows, kept)
        prunes = plan.drops_hidden_states
        self._cache.store_prompt(self._sequence, layer, positions, kv, None if prunes else keep)
        remember(self._cache, self._sequence, layer, plan, observer, keep)
        if prunes and keep is not None:
            return to_device(keep[0], kv.device)
        return torch.arange(rows, device=kv.device)

    def leave(self, layer: int, positions: Positions, hidden: torch.Tensor) -> None:
        self._cache.hidden.spill(self._sequence, layer + 1, positions, hidden)

    def end(self, layer: int) -> Iterator[None]:
        return iter(())

    def hand_on(self) -> None:
        return None

    def _kept(self, layer: int, rows: int) -> int:
        """How many of ``rows`` rows stay: ``prune`` chooses for the next layer, others for this."""
        chosen = self._first_layer + layer + self.plan.drops_hidden_states
        return rows if chosen == len(self.plan.kept) else min(rows, self.plan.kept[chosen])


def layer_observer(plan: KeepPlan, rows: int, past: int, chooses: bool, recent: int) -> LayerObserver:
    """What is looked at in a layer where something is chosen, or remembered for later choices.

    Args:
        rows: of the prompt, behind ``past`` tokens.
        recent: newest tokens that stay in any case.
    """
    looks = chooses or plan.remembers
    return LayerObserver(
        plan.observes if looks else None, plan.heads, rows, past, 0 if plan.remembers else recent
    )


def observed(
    plan: KeepPlan,
    recent: int,
    observer: LayerObserver,
    kv: torch.Tensor,
    layer: LlamaLayer,
    next_position: int,
    rotate: Rotate,
    floors: Floors | None,
) -> Observed:
    """What a policy has before it, of tokens whose ``kv`` is [tokens, 2, KV heads, head size]."""
    attention = observer.attention
    return Observed(
        sinks=plan.sinks,
        recent=recent,
        heads=plan.heads,
        device=kv.device,
        attention=None if attention is None else over_heads(attention, plan.heads),
        kv=kv,
        output=layer.output_weight,
        queries=observer.queries,
        gate=layer.gate,
        rotation=lambda count: rotate(np.arange(next_position, next_position + count, dtype=np.int32)),
        floors=floors,
    )


def choose_kept(
    choose: Chooser, plan: KeepPlan, seen: Observed, sets: int, tokens: int, kept: int
) -> Indices:
    """Which of a layer's ``tokens`` tokens stay, int64 [sets, kept]; the ends where nothing else does."""
    if plan.chooses(kept):
        return choose(seen, (sets,), tokens, kept)
    return on_host(ends(seen, tokens, kept, None), (sets,))


def remember(
    cache: ShardCache,
    sequence: int,
    layer: int,
    plan: KeepPlan,
    observer: LayerObserver,
    keep: Indices | None,
) -> None:
    """Keeps the attention that tokens have got which stay, ``keep`` or all, for later choices."""
    attention = observer.attention
    if not plan.remembers or attention is None:
        return
    kept = attention
    if keep is not None:
        kept = attention.gather(1, to_device(keep, attention.device).expand(len(attention), -1))
    cache.device.scores.put(sequence, layer, plan.score_base - kept.shape[1], kept)
