"""Where the model meets the cache: attention of a prefill, and of a decode step, layer by layer."""

from collections.abc import Sequence

import torch

from workers.compression.plan import KeepPlan
from workers.compression.select import keep_of_prompt
from workers.kv.cache import ShardCache
from workers.kv.host import Positions
from workers.model.attention import decode_attention, prefill_attention, window_scores


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
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, survivors = [], []
        start = 0
        for sequence, count in zip(self._sequences, self.rows, strict=True):
            own = slice(start, start + count)
            keep = self._keep(self._cache.plan(sequence), layer, query[own], key[own])
            out = prefill_attention(query[own], key[own], value[own])
            kv = torch.stack((key[own], value[own]), dim=1)
            prunes = self._cache.plan(sequence).drops_hidden_states
            self._cache.store_prompt(sequence, layer, self.positions[own], kv, None if prunes else keep)
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

    def __init__(self, cache: ShardCache, sequences: Sequence[int]) -> None:
        self._cache, self._sequences = cache, sequences
        self._targets = cache.score_targets(sequences)

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        self._cache.append(self._sequences, layer, torch.stack((key, value), dim=1))
        batch = self._cache.batch(self._sequences, layer)
        attended, probabilities = decode_attention(query, batch)
        if self._targets is not None:
            self._cache.add_scores(layer, self._targets, probabilities, batch.lengths)
        return attended, None
