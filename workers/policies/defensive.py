"""What some row may need: the worst case, not the average (DefensiveKV, Feng et al., arXiv 2510.13334).

A token's score is the most that any of the window's rows pays it, by the most attentive query head of a KV
head, and at least the mean of such scores: what no row has looked at may be needed yet. It is multiplied by
what the token's value adds to the layer's output (CriticalKV, arXiv 2502.03805), and neighbours share the
greatest.

Other than in the authors' code: heads keep equal counts; the window looks, but only its newest tokens stay
in any case, so that it may be long where little is kept; neighbours share at last and not row by row; and
what is added is measured by its length, for which matrices as large as a head will do. Theirs is the sum of
absolute values, which takes a product as large as the layer's own; docs/policies.md has what it wins.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.capacity import asked_counts, capacities, half_at_most, keep_prompt, same_share, sets
from workers.policies.observed import Observed, best, best_by_attention
from workers.policies.policy import Policy, Target, heads_knob, knob

if TYPE_CHECKING:
    import torch

# First and newest tokens, which stay in any case; of the latter fewer where little stays.
SINKS, RECENT = 4, 32


@dataclass(frozen=True)
class DefensiveKnobs:
    """The knobs of the released code by their names; windows are 32 there, and kernels 5."""

    compression_ratio: float = knob(0.5, "[0, 1)", "share of the prompt that goes", counts=True)
    window_size: int = knob(200, "[1, ...)", "newest rows, which look at the others")
    kernel_size: int = knob(
        7, "[1, ...)", "neighbours that share the greatest of their scores; an odd number"
    )
    heads: str = heads_knob("each")


def plan_defensive(target: Target, knobs: DefensiveKnobs) -> KeepPlan:
    """The counts for one prompt; of generated tokens that leave the window a layer keeps the same share."""
    usual = int(target.prompt_tokens * (1 - knobs.compression_ratio))
    counts = _pruned(target, usual) if target.prunes else capacities(target, usual, SINKS + 1)
    generation = same_share(target, counts, knobs.window_size, RowAttention(rows=knobs.window_size))
    worst = RowAttention(rows=knobs.window_size, over_rows="max")
    recent = half_at_most(RECENT, target, counts, SINKS)
    heads = "mean" if target.prunes else sets(knobs.heads)
    return keep_prompt(target, counts, recent, SINKS, worst, heads, generation)


def _pruned(target: Target, usual: int) -> tuple[int, ...]:
    """All tokens in the first layer, whose attention chooses what goes through all others, alike."""
    if target.tokens is not None:
        return asked_counts(target)
    whole = sum(capacities(target, usual)) - target.prompt_tokens
    rest = max(SINKS + 1, whole // max(1, target.layers - 1))
    return (target.prompt_tokens, *(min(rest, target.prompt_tokens),) * (target.layers - 1))


def choose(observed: Observed, tokens: int, keep: int, knobs: DefensiveKnobs) -> "torch.Tensor":
    """Keeps what has the greatest score; of generated tokens, what got most attention."""
    from torch.nn import functional  # not at the top: descriptions load without torch

    if observed.output is None:
        return best_by_attention(observed, tokens, keep, knobs)
    assert observed.attention is not None
    context = tokens - observed.recent
    worst = observed.attention[..., :context]
    floored = worst.clamp(min=worst.mean(dim=-1, keepdim=True))
    scores = floored * observed.over_heads(added(observed, context))
    size = min(knobs.kernel_size, 2 * context - 1)
    pooled = functional.max_pool1d(scores, size, stride=1, padding=size // 2)[..., :context]
    return best(observed, functional.pad(pooled, (0, observed.recent)), keep)


def added(observed: Observed, context: int) -> "torch.Tensor":
    """How much each value adds to the output, fp32 [KV heads, context]; of its query heads, a mean."""
    assert observed.kv is not None
    assert observed.output is not None
    kv_heads = observed.kv.shape[2]
    lengths = observed.kv.new_zeros(kv_heads, context).float()
    # One by one, as fp32 takes its room.
    for head, weight in enumerate(observed.output.chunk(kv_heads, dim=1)):
        rows = weight.float().flatten(0, 1)  # [hidden * query heads, head size]
        values = observed.kv[:context, 1, head].float()
        lengths[head] = (values @ (rows.T @ rows / weight.shape[1]) * values).sum(dim=-1)
    return lengths.clamp(min=0).sqrt()


POLICY = Policy(
    "defensive",
    "1",
    "what some row may need, by what it adds to the output (DefensiveKV, arXiv 2510.13334)",
    DefensiveKnobs,
    plan_defensive,
    choose,
    prefills=("evict", "prune"),
    calibrates=True,
)
