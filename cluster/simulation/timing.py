"""How long a pipeline takes, from what its steps have to do at least. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.budget.plan import KeepPlan
from workers.model.config import ModelConfig
from workers.model.work import Limits, prefill_flops, weights_read


@dataclass(frozen=True)
class Costs:
    """How many times the least time each part of the work takes.

    Attributes:
        weights: reading the weights for a decode step.
        kv: reading the KV of the sequences that decode.
        rows: the products of a decode step's rows.
        prefill: the products and the attention of prompts.
    """

    weights: float
    kv: float
    rows: float
    prefill: float


class Timing:
    """Seconds of decode rounds and prefills on a pipeline of ``shards`` equal shards."""

    def __init__(
        self, model: ModelConfig, itemsize: int, shards: int, limits: Limits, costs: Costs
    ) -> None:
        """``itemsize``: bytes of a weight; ``limits``: of one shard's device."""
        self._model, self._shards, self._limits, self._costs = model, shards, limits, costs
        weights = weights_read(model)
        self._weights = costs.weights * weights * itemsize / limits.read_bytes_per_second
        self._kv_byte = costs.kv / limits.read_bytes_per_second
        self._row = costs.rows * 2 * weights / limits.flops_per_second

    def decode_round(self, sequences: int, kv_bytes: float) -> float:
        """Seconds in which each of ``sequences``, with ``kv_bytes`` together, gets a token.

        They go round in as many parts as there are shards, each of which reads its weights for every part;
        and take as long as the largest part.
        """
        part = -(-sequences // self._shards)
        return self._weights + part * (self._kv_byte * kv_bytes / sequences + self._row)

    def prefill(self, plans: Sequence[KeepPlan]) -> float:
        """Seconds that each shard takes for prompts that share a micro-batch."""
        flops = sum(prefill_flops(plan, self._model) for plan in plans)
        products = self._costs.prefill * flops / self._limits.flops_per_second
        return max(products, self._weights) / self._shards
