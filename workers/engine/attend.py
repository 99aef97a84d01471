"""Where the model meets the cache: attention of a prefill, and of a decode step, layer by layer."""

from collections.abc import Sequence

import torch
from torch.profiler import record_function

from workers.compression.plan import KeepPlan
from workers.compression.select import keep_of_prompt
from workers.kernels.interface import Kernels
from workers.kv.cache import ShardCache
from workers.kv.host import Positions
from workers.model.attention import prefill_attention, window_scores


class PrefillAttend:
    """Attention of whole prompts; chooses what each layer keeps.

    ``rows`` and ``positions`` follow the rows that survive, as ``prune`` drops hidden states.
    """

    def __init__(
        self,
        cache: ShardCache,
        first_layer: int,
        sequences: Sequence[int],
        rows: Sequence[int],
        positions: Positions,
    ) -> None:
        self._cache, self._first_layer = cache, first_layer
        self._sequences = sequences
        self.rows = tuple(rows)
        self.positions = positions

    def __call__(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, survivors = [], []
        start = 0
        for sequence, count in zip(self._sequences, self.rows, strict=True):
            own = slice(start, start + count)
            with record_function("selection"):
                keep = self._keep(self._cache.plan(sequence), layer, query[own], kv[own, 0])
            with record_function("attention"):
                out = prefill_attention(query[own], kv[own, 0], kv[own, 1])
            prunes = self._cache.plan(sequence).drops_hidden_states
            self._cache.store_prompt(
                sequence, layer, self.positions[own], kv[own], None if prunes else keep
            )
            if prunes and keep is not None:
                out = out[keep]
                survivors.append(keep + start)
            else:
                survivors.append(torch.arange(start, start + count, device=out.device))
            attended.append(out)
            start += count
        rows = tuple(map(len, attended))
        if rows == self.rows:
            return torch.cat(attended), None
        alive = torch.cat(survivors)
        self.rows, self.positions = rows, self.positions[alive.cpu().numpy()]
        return torch.cat(attended), alive

    def _keep(
        self, plan: KeepPlan, layer: int, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor | None:
        """Rows that stay; None if all do. ``prune`` chooses for the next layer, others for this."""
        index = self._first_layer + layer
        if plan.drops_hidden_states:
            index += 1
            if index == len(plan.kept):
                return None
        kept, tokens = plan.kept[index], len(key)
        if kept == tokens:
            return None
        scores = None
        if kept > plan.recent + plan.sinks:
            scores = window_scores(query[tokens - plan.recent :], key, plan.distance_weight)
        return keep_of_prompt(scores, tokens, kept, plan.recent, plan.sinks)


class DecodeAttend:
    """Attention of one new token a sequence; accumulates what compression will go by."""

    def __init__(self, cache: ShardCache, sequences: Sequence[int], kernels: Kernels) -> None:
        self._cache, self._sequences, self._kernels = cache, sequences, kernels
        self._targets = cache.score_targets(sequences)

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, None]:
        self._cache.append(self._sequences, layer, kv)
        tail = self._targets.tail if self._targets else 0
        batch = self._cache.batch(self._sequences, layer)
        with record_function("attention"):
            attended, shares = self._kernels.decode_attention(query, batch, tail)
        if self._targets:
            self._cache.add_scores(layer, self._targets, shares)
        return attended, None
