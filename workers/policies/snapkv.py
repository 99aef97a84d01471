"""SnapKV (Li et al., arXiv 2404.14469): what the end of the prompt looks at, with its surroundings.

The prompt is compressed, what is generated stays, as in its authors' code. Attention is the mean of the
query heads of a KV head, as in kvpress.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, keep_prompt, sets
from workers.policies.observed import Observed, best
from workers.policies.policy import Policy, Target, heads_knob, knob

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SnapKVKnobs:
    """The knobs of the released code by their names, at its values."""

    window_size: int = knob(64, "[1, ...)", "latest tokens, which stay and look at the others")
    max_capacity_prompt: int = knob(320, "[1, ...)", "tokens of the prompt that stay", counts=True)
    kernel_size: int = knob(5, "[1, ...)", "neighbours that share their attention; an odd number")
    pooling: str = knob("avgpool", "avgpool|maxpool", "how they do")
    heads: str = heads_knob("each")


def plan_snapkv(target: Target, knobs: SnapKVKnobs) -> KeepPlan:
    """The counts for one prompt."""
    counts = capacities(target, knobs.max_capacity_prompt)
    observes = RowAttention(rows=knobs.window_size)
    return keep_prompt(target, counts, knobs.window_size, 0, observes, sets(knobs.heads))


def choose(observed: Observed, tokens: int, keep: int, knobs: SnapKVKnobs) -> "torch.Tensor":
    """Keeps the window, and of what is before it what gets most attention on average over neighbours."""
    from torch.nn import functional  # not at the top: descriptions load without torch

    assert observed.attention is not None
    context = observed.attention[..., : tokens - observed.recent]
    size = min(knobs.kernel_size, 2 * context.shape[-1] - 1)
    pool = functional.avg_pool1d if knobs.pooling == "avgpool" else functional.max_pool1d
    pooled = pool(context, size, stride=1, padding=size // 2)[..., : context.shape[-1]]
    return best(observed, functional.pad(pooled, (0, observed.recent)), keep)


POLICY = Policy(
    "snapkv",
    "1",
    "what the end of the prompt looks at, with its surroundings (SnapKV, arXiv 2404.14469)",
    SnapKVKnobs,
    plan_snapkv,
    choose,
)
