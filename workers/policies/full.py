"""The whole cache, nothing evicted: what the other policies are measured against."""

from dataclasses import dataclass

from workers.budget.plan import KeepPlan
from workers.policies.policy import Policy, Target


@dataclass(frozen=True)
class FullKnobs:
    """There are none."""


def plan_full(target: Target, knobs: FullKnobs) -> KeepPlan:
    """Keeps every token in every layer."""
    tokens = target.prompt_tokens
    return KeepPlan(prompt_tokens=tokens, kept=(tokens,) * target.layers, recent=tokens)


POLICY = Policy("full", "1", "all tokens", FullKnobs, plan_full, keeps_all=True)
