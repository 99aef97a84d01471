"""Recall "turn": a prompt that goes on with what earlier turns of its session left."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch

from workers.backends.stopwatch import Stopwatch
from workers.device import to_device
from workers.execute.blocks import blocks, finish
from workers.execute.choice import Chooser
from workers.execute.generation import Generation
from workers.execute.observe import LayerObserver
from workers.execute.prompt import Rotate, choose_kept, layer_observer, observed, remember
from workers.kv.cache import ShardCache
from workers.kv.entry import GatheredLayer, Positions, in_order, with_rows
from workers.model.llama import LlamaLayer, LlamaStage
from workers.recall.lifted import LiftedRows, attend


class ContinuedPrompt:
    """New rows of a sequence that has a past; see ``Prompt``.

    Each layer's new rows attend to what there is of the past on the device and, with recall, on the host;
    then it is chosen anew, by the new rows of the recent window, what of all that stays on the device.

    With ``prune``, new rows that are not chosen go no deeper. With recall, rows that it dropped in earlier
    turns are lifted: from the layer before which they wait, they go with the new rows through all that
    follow, and get the keys and values that they lack. So a second turn does what the first one saved.
    """

    past: GatheredLayer | None = None

    def __init__(
        self,
        sequence: int,
        generation: Generation,
        cache: ShardCache,
        model: LlamaStage,
        first_layer: int,
        lifted: LiftedRows,
        recall: bool,
        choose: Chooser,
        rotate: Rotate,
        block_rows: int,
        stopwatch: Stopwatch,
    ) -> None:
        """
        Args:
            first_layer: of the shard, in the model.
            lifted: rows of the past that come so from the shard before.
            recall: what is on the host comes back.
            rotate: rotations of positions.
            block_rows: how many of them are computed together.
        """
        self.plan = generation.plan(sequence)
        self.waits = self.plan.spills_hidden
        self._sequence, self._generation, self._cache = sequence, generation, cache
        self._layers = [cast(LlamaLayer, layer) for layer in model.layers]
        self._first_layer, self._recall = first_layer, recall
        self._choose, self._rotate = choose, rotate
        self._block_rows, self._stopwatch = block_rows, stopwatch
        self._lifted, self._lost = lifted, lifted.first(0)

    def begin(self, layer: int) -> Iterator[None]:
        self._gathered = self._cache.gather(self._sequence, layer, self._recall)
        if self.waits:
            self._take_up(layer)
            yield from self._lift(layer)
        self.past = self._gathered

    def observer(self, layer: int, rows: int) -> LayerObserver:
        plan, past = self.plan, self._gathered.tokens
        kept = plan.kept[self._first_layer + layer]
        chooses = kept < past + rows and plan.chooses(kept)
        return layer_observer(plan, rows, past, chooses, min(plan.recent, rows))

    def keep(
        self, layer: int, positions: Positions, kv: torch.Tensor, observer: LayerObserver
    ) -> torch.Tensor:
        plan, rows, tokens = self.plan, len(positions), len(kv)
        kept = min(plan.kept[self._first_layer + layer], tokens)
        keep = np.tile(np.arange(tokens), (len(self._gathered.positions), 1))
        if kept < tokens:
            with self._stopwatch.on("selection"):
                recent, behind = min(plan.recent, rows), int(positions[-1]) + 1
                own = self._layers[layer]
                floors = self._choose.floors(with_rows(self._gathered.positions, positions), kv.device)
                seen = observed(plan, recent, observer, kv, own, behind, self._rotate, floors)
                keep = choose_kept(self._choose, plan, seen, len(keep), tokens, kept)
        past = self._gathered
        if past.kv.dtype != kv.dtype:  # stored in fewer bits, and decoded in more than the rows have
            kv = torch.cat((past.kv, kv[past.tokens :].to(past.kv.dtype)))
        gathered = GatheredLayer(
            with_rows(past.positions, positions), with_rows(past.places, np.full(rows, -1)), kv
        )
        self._cache.replace(self._sequence, layer, gathered, keep)
        self._generation.keep(self._sequence, layer, kept)
        remember(self._cache, self._sequence, layer, plan, observer, keep)
        if plan.drops_hidden_states:
            return to_device(keep[0][keep[0] >= tokens - rows] - (tokens - rows), kv.device)
        return torch.arange(rows, device=kv.device)

    def leave(self, layer: int, positions: Positions, hidden: torch.Tensor) -> None:
        # They wait before the next layer, but not for this turn.
        self._lost = self._lost.joined(positions, hidden)

    def end(self, layer: int) -> Iterator[None]:
        if len(self._lifted):
            yield from finish(self._layers[layer], self._lifted.hidden, self._lifted_out, self._block_rows)

    def hand_on(self) -> tuple[Positions, torch.Tensor] | None:
        if not self.waits:
            return None
        self._take_up(len(self._layers))
        return self._lifted.positions, self._lifted.hidden

    def _take_up(self, layer: int) -> None:
        """Lifts what waits before a layer; what the layer before has dropped waits there from now on."""
        waiting = self._cache.hidden.take(self._sequence, layer)
        if waiting is not None:
            self._lifted = self._lifted.joined(*waiting)
        self._cache.hidden.spill(self._sequence, layer, self._lost.positions, self._lost.hidden)
        self._lost = self._lost.first(0)

    def _lift(self, layer: int) -> Iterator[None]:
        """Puts keys and values of lifted rows in the past, and lets them attend to it."""
        lifted, past = self._lifted, self._gathered
        if not len(lifted):
            return
        queries, kv = [], [past.kv]
        lifted_blocks = list(blocks(len(lifted), self._block_rows))
        for block in lifted_blocks:
            rotation = self._rotate(lifted.positions[block])
            query, new = self._layers[layer].project(lifted.hidden[block], rotation)
            queries.append(query)
            kv.append(new)
            yield
        self._gathered = in_order(
            with_rows(past.positions, lifted.positions),
            with_rows(past.places, np.full(len(lifted), -1)),
            torch.cat(kv),
        )
        self._lifted_out = torch.cat([query.flatten(1) for query in queries])
        for block, query in zip(lifted_blocks, queries, strict=True):
            window = self._layers[layer].window
            self._lifted_out[block] = attend(query, lifted.positions[block], self._gathered, window)
            yield
