"""What a policy has before it when it chooses. Loads without torch, as descriptions of policies must."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import Heads
from workers.policies.floors import Floors
from workers.policies.gates import Gate

if TYPE_CHECKING:
    import torch

    Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Moments:
    """Of the queries of rows, before their rotation.

    Attributes:
        mean: fp32 [heads, head size].
        covariance: fp32 [heads, head size, head size].
    """

    mean: "torch.Tensor"
    covariance: "torch.Tensor"


@dataclass(frozen=True)
class Observed:
    """What a plan's observation has come to, of the tokens among which is chosen, oldest first.

    Attributes:
        sinks, recent: the first and the newest of them, which stay in any case.
        heads: over which a choice is made; then there are as many sets as KV heads, else one.
        device: where a choice is wanted.
        attention: fp32 [..., sets, tokens], of one layer or of several that are chosen for at once; 0 for
            tokens that stay in any case, of a prompt of which nothing has to be remembered.
        kv: keys and values, [tokens, 2, KV heads, head size]; not to be changed.
        output: weight of the attention's output, [hidden, heads, head size], where a prompt is chosen of;
            not to be changed.
        queries: their moments.
        gate: of the layer, which foresees how much attention tokens of ``kv`` will get; where the model's
            were trained. See ``gates.py``.
        rotation: cosines and sines, fp32 [n, head size / 2], of as many positions behind the tokens.
        floors: the least that stays of instructions; None: nothing. ``best`` keeps it.
    """

    sinks: int
    recent: int
    heads: Heads
    device: "torch.device"
    attention: "torch.Tensor | None" = None
    kv: "torch.Tensor | None" = None
    output: "torch.Tensor | None" = None
    queries: Moments | None = None
    gate: Gate | None = None
    rotation: "Callable[[int], Rotation] | None" = None
    floors: Floors | None = None

    def over_heads(self, scores: "torch.Tensor") -> "torch.Tensor":
        """``scores`` [..., KV heads, tokens] for each set."""
        return over_heads(scores, self.heads)


def over_heads(scores: "torch.Tensor", heads: Heads) -> "torch.Tensor":
    """``scores`` [..., KV heads or 1, tokens] for each set, as ``heads`` has it."""
    if heads == "each" or scores.shape[-2] == 1:
        return scores
    return scores.amax(-2, keepdim=True) if heads == "max" else scores.mean(-2, keepdim=True)


def best(observed: Observed, scores: "torch.Tensor", keep: int) -> "torch.Tensor":
    """Keeps what stays in any case, the recent first, what floors keep, and the greatest scores.

    Of equals the older stays.

    Args:
        scores: [..., sets, tokens].

    Returns:
        Indices in order, int64 [..., sets, keep].
    """
    sinks = min(observed.sinks, keep - observed.recent)
    if observed.floors:
        scores = observed.floors.lift(scores, sinks, observed.recent, keep)
    if observed.sinks or observed.recent:
        scores = scores.clone()
        scores[..., :sinks] = float("inf")
        scores[..., scores.shape[-1] - observed.recent :] = float("inf")
    order = scores.sort(stable=True, dim=-1, descending=True).indices
    kept: torch.Tensor = order[..., :keep].sort(dim=-1).values
    return kept


def best_by_attention(observed: Observed, tokens: int, keep: int, knobs: object) -> "torch.Tensor":
    """Keeps those that got most attention; a policy's ``choose``."""
    assert observed.attention is not None
    return best(observed, observed.attention, keep)


def ends(observed: Observed, tokens: int, keep: int, knobs: object) -> "torch.Tensor":
    """Keeps the first tokens and the newest, whatever they are; a policy's ``choose``."""
    import torch  # not at the top, see there

    recent = max(observed.recent, keep - observed.sinks)
    index = torch.arange(keep, device=observed.device)
    return (index + (index >= keep - recent) * (tokens - keep))[None]
