"""The least that stays of instructions (after Chen et al., arXiv 2510.00231, section 5).

They keep as large a share of each instruction as of the others ("fair eviction"), or tokens that somebody
has named ("whitelisting"). Here a chat's system messages keep a share of their own tokens, whatever stays
of the others: as large a share as of all was no more than what policies keep of them anyway, and won
nothing (docs/policies.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from workers.budget.span import Span

if TYPE_CHECKING:
    import torch

# Of what there is to choose beside the first and the newest tokens, what floors take at most.
MOST = 0.5


@dataclass(frozen=True)
class Floors:
    """The least that stays of each span.

    Attributes:
        least: tokens of each, int64 [spans + 1]; the last is of all that is in none, and not looked at.
        of: in which of them each token is that is chosen among, int64 [..., sets, tokens].
    """

    least: "torch.Tensor"
    of: "torch.Tensor"

    @classmethod
    def among(
        cls, positions: npt.NDArray[np.int32], spans: Sequence[Span], share: float, device: "torch.device"
    ) -> "Floors | None":
        """Those of tokens at ``positions`` [..., sets, tokens]; None where there are none.

        Args:
            spans: of the prompt, in order.
            share: of each one's tokens that stays.
        """
        from workers.device import to_device  # not at the top: descriptions load without torch

        if not (spans and share):
            return None
        least = np.array([*(math.ceil(share * span.tokens) for span in spans), 0])
        span = np.searchsorted([each.first for each in spans], positions, side="right") - 1
        inside = (span >= 0) & (positions < np.array([each.end for each in spans])[span])
        return cls(to_device(least, device), to_device(np.where(inside, span, len(spans)), device))

    def lift(self, scores: "torch.Tensor", sinks: int, recent: int, keep: int) -> "torch.Tensor":
        """``scores`` in which each span's best have infinity, as many as it lacks beside what stays anyway.

        Where the spans lack more together than MOST of what is left to choose, each gets its share of it.

        Args:
            scores: [..., sets, tokens].
            sinks, recent: the first and newest tokens, which stay in any case.
            keep: tokens that stay.
        """
        import torch  # not at the top, see there

        # Of sets that one choice is made for, each has its own floors.
        scores, of = torch.broadcast_tensors(scores, self.of)  # type: ignore[no-untyped-call]
        tokens, none = scores.shape[-1], len(self.least) - 1
        free = of.clone()
        free[..., :sinks] = free[..., tokens - recent :] = none
        there = _counts(free, none + 1)
        # Those that stay anyway count, and what is gone cannot stay.
        lacking = (self.least - (_counts(of, none + 1) - there)).clamp(min=0).minimum(there)
        lacking[..., none] = 0
        room = int(MOST * (keep - sinks - recent))
        lacked = lacking.sum(dim=-1, keepdim=True)
        lacking = torch.where(lacked > room, lacking * room // lacked.clamp(min=1), lacking)
        # Span by span, the best first, and each one's place in its own.
        best_first = scores.sort(stable=True, dim=-1, descending=True).indices
        spans, order = free.gather(-1, best_first).sort(stable=True, dim=-1)
        place = torch.arange(tokens, device=scores.device) - (there.cumsum(-1) - there).gather(-1, spans)
        stays = torch.zeros_like(free, dtype=torch.bool)
        stays.scatter_(-1, best_first.gather(-1, order), place < lacking.gather(-1, spans))
        return scores.masked_fill(stays, float("inf"))


def _counts(of: "torch.Tensor", spans: int) -> "torch.Tensor":
    """Tokens of each span, int64 [..., spans], where ``of`` [..., tokens] has theirs."""
    counts = of.new_zeros(*of.shape[:-1], spans)
    return counts.scatter_add_(-1, of, of.new_ones(()).expand(of.shape))
