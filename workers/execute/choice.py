"""A policy's choice, whose faults end a sequence and not its shard."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from workers.budget.span import Span
from workers.events import tell
from workers.kv.entry import Positions
from workers.kv.score_pages import Indices
from workers.policies.floors import Floors
from workers.policies.observed import Observed, ends
from workers.policies.registry import Choose

logger = logging.getLogger(__name__)


class Chooser:
    """Chooses for one sequence what stays.

    Attributes:
        failure: what the policy did wrong, in words; "" as long as it did nothing. The ends stay then, so
            that the sequence's books are right until it is ended.
        instructions: spans of the prompt of which some stays.
    """

    def __init__(
        self, sequence: int, choose: Choose, instructions: Sequence[Span] = (), floor: float = 0.0
    ) -> None:
        """``floor``: share of the prompt's ``instructions`` that stays at least."""
        self._sequence, self._choose = sequence, choose
        self.instructions, self._floor = instructions if floor else (), floor
        self.failure = ""

    def floors(self, positions: Positions, device: torch.device) -> Floors | None:
        """The least that stays of tokens at ``positions`` [..., sets, tokens], for ``Observed``."""
        return Floors.among(positions, self.instructions, self._floor, device)

    def __call__(self, observed: Observed, sets: Sequence[int], tokens: int, keep: int) -> Indices:
        """Indices that stay of ``tokens`` tokens, int64 [*sets, keep], ascending."""
        if not self.failure:
            try:
                chosen = on_host(self._choose(observed, tokens, keep), sets)
                self.failure = _fault(chosen, tokens, keep)
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
            if self.failure:
                tell(logger, logging.ERROR, "policy_failed", sequence=self._sequence, why=self.failure)
        return on_host(ends(observed, tokens, keep, None), sets) if self.failure else chosen


def on_host(chosen: torch.Tensor, sets: Sequence[int]) -> Indices:
    """``chosen`` [..., sets, kept], the same for all ``sets`` where there are fewer."""
    return chosen.cpu().expand(*sets, -1).numpy()


def _fault(chosen: Indices, tokens: int, keep: int) -> str:
    if chosen.shape[-1] != keep:
        return f"it chose {chosen.shape[-1]} tokens of {tokens} where {keep} stay"
    if not ((np.diff(chosen) > 0).all() and (chosen >= 0).all() and (chosen < tokens).all()):
        return f"it chose indices that do not ascend from 0 to {tokens - 1}"
    return ""
