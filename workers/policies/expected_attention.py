"""Expected attention (Devoto et al., arXiv 2510.00636): what queries to come will attend to on average.

Their distribution is taken from the prompt's own queries, and turned to the positions behind it. The prompt
is compressed, what is generated stays, as in kvpress.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import QueryMoments
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, keep_prompt, sets
from workers.policies.observed import Observed, best
from workers.policies.policy import Policy, Target, heads_knob, knob

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExpectedAttentionKnobs:
    """The knobs of the released code by their names, at its values."""

    compression_ratio: float = knob(0.5, "[0, 1)", "share of the prompt that goes", counts=True)
    n_future_positions: int = knob(
        512, "[1, ...)", "positions behind the prompt that queries are turned to"
    )
    n_sink: int = knob(4, "[0, ...)", "first tokens, which stay, and whose queries do not count")
    epsilon: float = knob(0.0, "[0, ...)", "what is added to attention before values weigh it")
    heads: str = heads_knob("each")


def plan_expected_attention(target: Target, knobs: ExpectedAttentionKnobs) -> KeepPlan:
    """The counts for one prompt."""
    usual = int(target.prompt_tokens * (1 - knobs.compression_ratio))
    counts = capacities(target, usual, least=knobs.n_sink + 1)
    return keep_prompt(target, counts, 0, knobs.n_sink, QueryMoments(knobs.n_sink), sets(knobs.heads))


def choose(observed: Observed, tokens: int, keep: int, knobs: ExpectedAttentionKnobs) -> "torch.Tensor":
    """Keeps what expected attention times the length of the value is greatest for."""
    assert observed.kv is not None
    mean, covariance = _turned(observed, knobs.n_future_positions)
    kv_heads, size = observed.kv.shape[2:]
    mean, covariance = mean.view(kv_heads, -1, size), covariance.view(kv_heads, -1, size, size)
    scores = mean.new_zeros(kv_heads, tokens)
    for head in range(kv_heads):  # one by one, as fp32 takes its room
        keys, values = observed.kv[observed.sinks :, :, head].float().unbind(1)
        logits = mean[head] @ keys.T * size**-0.5  # [query heads, tokens]
        logits += (keys @ covariance[head] * keys).sum(dim=-1) / size / 2
        expected = logits.softmax(dim=-1).mean(dim=0) + knobs.epsilon
        scores[head, observed.sinks :] = expected * values.norm(dim=-1)
    return best(observed, observed.over_heads(scores), keep)


def _turned(observed: Observed, positions: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Mean and covariance of queries, turned by the mean rotation of so many positions to come."""
    assert observed.queries is not None
    assert observed.rotation is not None
    cos, sin = (part.mean(dim=0) for part in observed.rotation(positions))
    half, mean, covariance = len(cos), observed.queries.mean, observed.queries.covariance
    turn = mean.new_zeros(2 * half, 2 * half)
    turn.diagonal()[:half] = turn.diagonal()[half:] = cos
    turn.diagonal(half)[:] = -sin
    turn.diagonal(-half)[:] = sin
    return mean @ turn.T, turn @ covariance @ turn.T


POLICY = Policy(
    "expected_attention",
    "1",
    "what queries to come will attend to on average, whatever is asked (arXiv 2510.00636)",
    ExpectedAttentionKnobs,
    plan_expected_attention,
    choose,
)
