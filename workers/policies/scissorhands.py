"""Scissorhands (Liu et al., arXiv 2305.17118): what has mattered will matter; what rows pass over goes.

There is no code of its authors. What the paper leaves open is decided so: a row passes over a token where
it pays less than 1 / the tokens that it sees, by the mean of a KV head's query heads. Rows are counted,
not divided by how many saw the token, so that young tokens fare better; of equals the newer stays. Behind
the prompt the last ``history_window`` rows before a choice are counted, or as many as there have been since
the one before. All layers have the same budget; ``tokens`` gives each its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, hold, sets
from workers.policies.observed import Observed, best
from workers.policies.policy import Policy, Target, drop_knob, heads_knob, knob

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScissorhandsKnobs:
    """The values of the paper, whose ``drop`` is half the budget."""

    budget: float = knob(0.2, "(0, 1]", "share of the prompt that stays", counts=True)
    history_window: int = knob(400, "[1, ...)", "rows that are looked at before a choice")
    recent_window: int = knob(10, "[1, ...)", "latest tokens, which stay")
    drop: int = drop_knob()
    heads: str = heads_knob("each")


def plan_scissorhands(target: Target, knobs: ScissorhandsKnobs) -> KeepPlan:
    """The counts for one prompt, as they stay."""
    counts = capacities(target, int(knobs.budget * target.prompt_tokens))
    observes = RowAttention(rows=knobs.history_window, over_rows="low")
    recent = min(knobs.recent_window, *counts)
    return hold(target, counts, recent, knobs.drop, 0, observes, sets(knobs.heads))


def choose(observed: Observed, tokens: int, keep: int, knobs: ScissorhandsKnobs) -> "torch.Tensor":
    """Drops those that most rows have passed over; of equals, the older."""
    assert observed.attention is not None
    # Ranks, as counts are often equal; 64 bits have room for both.
    ranks = observed.attention.double() * -tokens + observed.attention.new_ones(tokens).cumsum(-1)
    return best(observed, ranks, keep)


POLICY = Policy(
    "scissorhands",
    "1",
    "the tokens that fewest rows have passed over (Scissorhands, arXiv 2305.17118)",
    ScissorhandsKnobs,
    plan_scissorhands,
    choose,
)
