"""Cuts the caches of sequences that grow down to what their policies keep."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from workers.budget.footprint import ShardLayout
from workers.budget.observation import KeysValues
from workers.budget.plan import GenerationPlan
from workers.device import to_device
from workers.execute.growing import Growing
from workers.execute.scores import runs
from workers.kv.cache import ShardCache
from workers.kv.entry import Positions, among
from workers.kv.score_pages import Indices
from workers.policies.gates import Gate
from workers.policies.observed import Observed, over_heads


class Compressor:
    """Chooses what stays of generated tokens, or of all, and cuts the rest."""

    def __init__(self, cache: ShardCache, layout: ShardLayout, gates: Sequence[Gate | None]) -> None:
        """``gates``: of each layer of the shard."""
        self._cache, self._layout, self._gates = cache, layout, gates

    def compress_chunk(self, sequence: int, growing: Growing, generation: GenerationPlan) -> None:
        """Cuts a chunk of generated tokens down to what the plan keeps in each layer.

        All layers at once: the chunk and the tokens behind it are as many in each.
        """
        layers = slice(self._layout.first, self._layout.end)
        keeps, chunk = np.array(generation.keeps[layers]), generation.chunk
        done = generation.chunks(growing.generated) - 1
        # A few numbers, which the host chooses among without waiting for each layer's choice.
        scores = self._cache.device.scores.take(sequence, chunk).cpu() if generation.accumulates else None
        stays = np.zeros((len(keeps), growing.plan.sets(self._layout.kv_heads), chunk), dtype=bool)
        starts = np.array(generation.start[layers]) + done * keeps
        wants_kv = isinstance(generation.observes, KeysValues)
        groups = np.arange(len(keeps)) if wants_kv else keeps
        for group in set(groups[keeps > 0].tolist()):
            alike = np.flatnonzero((groups == group) & (keeps > 0))
            layer, keep = int(alike[0]), int(keeps[alike[0]])
            own = None if scores is None else scores[torch.from_numpy(alike)]
            kv = self._cache.device.read(sequence, layer, int(starts[layer]))[:chunk] if wants_kv else None
            chosen = self._chosen(growing, generation, own, kv, chunk, keep, len(alike), layer)
            stays[alike] = among(chosen, chunk)
        self._cache.cut(sequence, 0, starts, stays)

    def rechoose(self, sequence: int, growing: Growing, generation: GenerationPlan, drop: int) -> None:
        """Drops so many of all tokens of each layer."""
        cache = self._cache
        lengths = [cache.device.length(sequence, layer) for layer in range(cache.layers)]
        scores = cache.device.scores.read(sequence) if generation.accumulates else None
        lacking = growing.lacking(self._layout.first, self._layout.end)
        wants_kv = isinstance(generation.observes, KeysValues)
        for alike in runs(range(cache.layers) if wants_kv else lengths):
            tokens, first, count = lengths[alike.start], int(lacking[alike.start]), alike.stop - alike.start
            own = None if scores is None else scores[alike, :, first : first + tokens]
            kv = cache.device.read(sequence, alike.start) if wants_kv else None
            positions = None
            if growing.choose.instructions:
                each = range(alike.start, alike.stop)
                positions = np.stack([cache.positions(sequence, layer) for layer in each])
            keep = tokens - drop
            chosen = self._chosen(growing, generation, own, kv, tokens, keep, count, alike.start, positions)
            if scores is not None and own is not None:
                left = own.gather(2, self._on_device(chosen).expand(-1, own.shape[1], -1))
                scores[alike, :, first : first + tokens] = pad(left, (0, drop))
            cache.cut(sequence, alike.start, np.zeros(count, dtype=np.int64), among(chosen, tokens))
        if scores is not None:
            forgets = generation.accumulates is not None and generation.accumulates.rows is not None
            cache.device.scores.write(sequence, torch.zeros_like(scores) if forgets else scores)

    def _chosen(
        self,
        growing: Growing,
        generation: GenerationPlan,
        attention: torch.Tensor | None,
        kv: torch.Tensor | None,
        tokens: int,
        keep: int,
        layers: int,
        first: int,
        positions: Positions | None = None,
    ) -> Indices:
        """Which of ``tokens`` tokens stay in ``layers`` layers, int64 [layers, sets, keep].

        Args:
            kv: of ``first``, the first of them, which then is alone.
            positions: int32 [layers, sets, tokens], where any of the prompt's instructions are among them.
        """
        plan = growing.plan
        device = self._cache.device.pool.rows.device if attention is None else attention.device
        if attention is not None:
            attention = over_heads(attention, plan.heads)
        gate = None if kv is None else self._gates[first]
        floors = None if positions is None else growing.choose.floors(positions, device)
        seen = Observed(
            *(generation.sinks, generation.recent, plan.heads, device, attention, kv),
            gate=gate,
            floors=floors,
        )
        return growing.choose(seen, (layers, plan.sets(self._layout.kv_heads)), tokens, keep)

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._cache.device.pool.rows.device)
