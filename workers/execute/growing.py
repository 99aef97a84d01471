"""What a shard knows of a sequence that grows."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from workers.budget.plan import KeepPlan
from workers.execute.choice import Chooser
from workers.kv.page_table import Lengths


@dataclass
class Growing:
    """A sequence's plan, and its generated tokens that are verified; the rest of its newest are not.

    ``choose`` is its policy's; ``base``: columns of scores before those of generated tokens. ``verifying``:
    those have been fed to be verified, and are no drafts. ``unpaid`` adds what each draft pays.
    """

    plan: KeepPlan
    choose: Chooser
    base: int
    generated: int = 0
    unverified: int = 0
    verifying: bool = False
    unpaid: list[Callable[[], None]] = field(default_factory=list)

    @property
    def uncompressed(self) -> int:
        """Generated tokens that compression has not passed over."""
        generation = self.plan.generation
        if generation is None:
            return self.generated
        return self.generated - generation.chunks(self.generated) * generation.chunk

    def lacking(self, first: int, end: int) -> Lengths:
        """Tokens that each layer from ``first`` to ``end`` has less than ``base``, if there is one."""
        kept = np.array(self.plan.kept[first:end])
        return self.base - kept if self.base else np.zeros_like(kept)
