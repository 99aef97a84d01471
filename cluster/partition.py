"""Which shard hosts which layers. Pure."""

from collections.abc import Sequence
from functools import cache

from pyramidserve.types import Compression
from workers.model.config import ModelConfig
from workers.policies.registry import plan
from workers.policies.settled import settled

# The prompt length at which retained bytes are compared; their proportions hardly move with it.
TYPICAL_PROMPT = 2048


def layer_costs(
    model: ModelConfig, compression: Compression, kv_dtype: str = "bfloat16"
) -> tuple[list[float], float]:
    """What each layer costs, and the head, as shares of the whole; KV is in ``kv_dtype``, of KV_FORMATS.

    Half of a layer's cost is the KV that it retains, half its work: its weights are read once a decode
    step, and so are the head's, which hold no KV.
    """
    prompt = min(TYPICAL_PROMPT, model.context)
    kept = plan(settled(compression, model, kv_dtype, prompt), prompt, model.layers).kept
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_size * model.hidden
    weights = attention + 3 * model.hidden * model.intermediate
    head = model.hidden * model.vocabulary
    work = weights * model.layers + head
    costs = [tokens / sum(kept) / 2 + weights / work / 2 for tokens in kept]
    return costs, head / work / 2


def boundaries(costs: Sequence[float], head_cost: float, shards: int) -> tuple[int, ...]:
    """First layers of the shards behind the first, so that the costliest shard costs least.

    Every shard gets at least one layer; the head belongs to the last.
    """
    totals = [0.0]
    for cost in costs:
        totals.append(totals[-1] + cost)

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The least worst cost of layers from ``first`` on ``left`` shards, and where they begin."""
        if left == 1:
            return totals[-1] - totals[first] + head_cost, ()
        options = []
        for end in range(first + 1, len(costs) - left + 2):
            worst, rest = best(end, left - 1)
            options.append((max(totals[end] - totals[first], worst), (end, *rest)))
        return min(options)

    return best(0, shards)[1]
