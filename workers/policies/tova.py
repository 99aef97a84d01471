"""TOVA (Oren et al., arXiv 2401.06104): what the last token attends to, the same for all heads."""

from dataclasses import dataclass

from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, hold, sets
from workers.policies.observed import best_by_attention
from workers.policies.policy import Policy, Target, drop_knob, heads_knob, knob


@dataclass(frozen=True)
class TovaKnobs:
    """The knob of the released code by its name; ``drop`` is 1 there."""

    cache_size: int = knob(1024, "[1, ...)", "tokens that stay", counts=True)
    drop: int = drop_knob()
    heads: str = heads_knob("all")


def plan_tova(target: Target, knobs: TovaKnobs) -> KeepPlan:
    """The counts for one prompt."""
    counts = capacities(target, knobs.cache_size)
    return hold(target, counts, 1, knobs.drop, 0, RowAttention(rows=1), sets(knobs.heads))


POLICY = Policy(
    "tova",
    "1",
    "what the last token attends to (TOVA, arXiv 2401.06104)",
    TovaKnobs,
    plan_tova,
    best_by_attention,
)
