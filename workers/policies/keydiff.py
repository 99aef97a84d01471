"""KeyDiff (Park et al., arXiv 2504.15364): keys that differ from the others; no query is looked at."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import KeysValues
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, hold, sets
from workers.policies.observed import Observed, best
from workers.policies.policy import Policy, Target, drop_knob, heads_knob, knob

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KeyDiffKnobs:
    """The paper's cache budget, and how often it is kept to."""

    cache_budget: int = knob(2048, "[1, ...)", "tokens that stay", counts=True)
    drop: int = drop_knob()
    heads: str = heads_knob("each")


def plan_keydiff(target: Target, knobs: KeyDiffKnobs) -> KeepPlan:
    """The counts for one prompt."""
    counts = capacities(target, knobs.cache_budget)
    return hold(target, counts, 0, knobs.drop, 0, KeysValues(), sets(knobs.heads))


def choose(observed: Observed, tokens: int, keep: int, knobs: KeyDiffKnobs) -> "torch.Tensor":
    """Drops the keys that point most in the direction of all keys' mean."""
    assert observed.kv is not None
    cosines = observed.kv.new_zeros(observed.kv.shape[2], tokens).float()
    for head, cosine in enumerate(cosines):  # one by one, as fp32 takes its room
        keys = observed.kv[:, 0, head].float()
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # fp32 is not copied
        anchor = keys.mean(dim=0)
        cosine.copy_(keys @ anchor / anchor.norm().clamp(min=1e-12))
    return best(observed, observed.over_heads(-cosines), keep)


POLICY = Policy(
    "keydiff",
    "1",
    "keys that differ from the others, whatever is asked (KeyDiff, arXiv 2504.15364)",
    KeyDiffKnobs,
    plan_keydiff,
    choose,
)
