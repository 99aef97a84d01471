"""Where the model meets the cache: attention of a prefill, and of a decode step, layer by layer."""

import torch
from torch.profiler import record_function

from workers.compression.plan import KeepPlan
from workers.compression.select import keep_of_prompt
from workers.engine.step import Step
from workers.kernels.interface import Kernels
from workers.kv.cache import ShardCache
from workers.kv.pool import PagedStep


class PrefillAttend:
    """Attention of whole prompts; chooses what each layer keeps.

    ``rows`` and ``positions`` follow the rows that survive, as ``prune`` drops hidden states.
    """

    def __init__(self, cache: ShardCache, kernels: Kernels, first_layer: int, step: Step) -> None:
        self._cache, self._kernels, self._first_layer = cache, kernels, first_layer
        self._sequences = step.sequences
        self.rows, self.positions = step.rows, step.positions

    def __call__(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, survivors = [], []
        start = 0
        for sequence, count in zip(self._sequences, self.rows, strict=True):
            own = slice(start, start + count)
            plan = self._cache.plan(sequence)
            kept, window = self._wanted(plan, layer, count)
            with record_function("attention"):
                out, scores = self._kernels.prefill_attention(
                    query[own], kv[own], window, plan.distance_weight
                )
            with record_function("selection"):
                keep = None
                if kept < count:
                    keep = keep_of_prompt(scores if window else None, count, kept, plan.recent, plan.sinks)
            prunes = plan.drops_hidden_states
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

    def _wanted(self, plan: KeepPlan, layer: int, count: int) -> tuple[int, int]:
        """How many of ``count`` rows stay, and how many of the newest must score the others.

        ``prune`` chooses for the next layer, others for this.
        """
        index = self._first_layer + layer + plan.drops_hidden_states
        kept = count if index == len(plan.kept) else plan.kept[index]
        by_scores = plan.recent + plan.sinks < kept < count
        return kept, plan.recent if by_scores else 0


class DecodeAttend:
    """Attention of one new token a sequence; ``shares`` collects that to the newest ``tail`` tokens.

    Each layer's are fp32 [sequences, tail], see ``Kernels.decode_attention``.
    """

    def __init__(self, step: PagedStep, tail: int, kernels: Kernels) -> None:
        self._step, self._tail, self._kernels = step, tail, kernels
        self.shares: list[torch.Tensor] = []

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, None]:
        self._step.write(layer, kv)
        with record_function("attention"):
            attended, shares = self._kernels.decode_attention(query, self._step.batch(layer), self._tail)
        self.shares.append(shares)
        return attended, None
