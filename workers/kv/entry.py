"""What a shard's cache knows of one sequence while it is there."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.plan import KeepPlan

Positions = npt.NDArray[np.int32]


@dataclass
class CachedSequence:
    """One sequence's books.

    ``positions`` are the input positions of each layer's slots as of the last change of order; slots
    behind them hold the newest tokens in order. The newest ``unverified`` are drafts or, when
    ``verifying``, have been fed to be verified; ``attention`` is what the drafts pay to scored tokens:
    places and values. ``recalled`` counts the tokens of each layer that came back from the host.
    """

    plan: KeepPlan
    positions: list[Positions]
    generated: int = 0
    peak_pages: int = 0
    unverified: int = 0
    verifying: bool = False
    attention: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    recalled: list[int] = field(default_factory=list)

    @property
    def uncompressed(self) -> int:
        """Generated tokens that compression has not passed over."""
        generation = self.plan.generation
        if generation is None:
            return self.generated
        return self.generated - generation.chunks(self.generated) * generation.chunk


@dataclass(frozen=True)
class GatheredLayer:
    """KV of one layer of a sequence, in order of positions.

    Attributes:
        positions: int32 [n].
        places: int64 [n], among the tokens on the host; -1 for those on the device.
        kv: [n, 2, KV heads, head size].
    """

    positions: Positions
    places: npt.NDArray[np.int64]
    kv: torch.Tensor
