"""A window of the latest tokens: what the papers compare with (arXiv 2306.14048, section 5)."""

from dataclasses import dataclass

from workers.budget.plan import KeepPlan
from workers.policies.capacity import CHUNK, capacities, hold
from workers.policies.policy import Policy, Target, knob


@dataclass(frozen=True)
class LocalKnobs:
    """Tokens that stay."""

    window: int = knob(1024, "[1, ...)", "latest tokens", counts=True)


def plan_local(target: Target, knobs: LocalKnobs) -> KeepPlan:
    """The counts for one prompt; ``kv_keep`` sets the window to that fraction of it."""
    counts = capacities(target, knobs.window)
    return hold(target, counts, min(counts), CHUNK)


POLICY = Policy("local", "2", "the latest tokens alone", LocalKnobs, plan_local)
