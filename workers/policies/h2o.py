"""H2O (Zhang et al., arXiv 2306.14048): heavy hitters, by the attention that they have got, and the latest.

As its authors' code does it, the whole prompt attends to all before it, and is cut once; each KV head has
tokens of its own. Where several query heads share one, their attention is added up.
"""

from dataclasses import dataclass

from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, hold, sets
from workers.policies.observed import best_by_attention
from workers.policies.policy import Policy, Target, drop_knob, heads_knob, knob


@dataclass(frozen=True)
class H2OKnobs:
    """The knobs of the released code by their names; ``drop`` is 1 there."""

    heavy_ratio: float = knob(
        0.1, "[0, 1]", "share of the prompt that stays for its attention", counts=True
    )
    recent_ratio: float = knob(0.1, "[0, 1]", "share of the prompt that stays as its latest", counts=True)
    drop: int = drop_knob()
    heads: str = heads_knob("each")


def plan_h2o(target: Target, knobs: H2OKnobs) -> KeepPlan:
    """The counts for one prompt, as they stay; of a count that is asked for, half is recent."""
    heavy, recent = (int(ratio * target.prompt_tokens) for ratio in (knobs.heavy_ratio, knobs.recent_ratio))
    counts = capacities(target, heavy + recent)
    if target.wanted is not None:
        recent = min(counts) // 2
    return hold(target, counts, recent, knobs.drop, 0, RowAttention(rows=None), sets(knobs.heads))


POLICY = Policy(
    "h2o",
    "1",
    "the tokens that got most attention, and the latest (H2O, arXiv 2306.14048)",
    H2OKnobs,
    plan_h2o,
    best_by_attention,
)
