"""What of scheduling was measured rather than derived; found on CPUs. Pure."""

import math
from dataclasses import dataclass

from workers.tuning import check_tuning


@dataclass(frozen=True, kw_only=True)
class ScheduleTuning:
    """How a scheduler weighs those that wait against those that run.

    Attributes:
        cohort_prefills: prompts that begin to decode together, in units of ``max_prefill_tokens``, at most:
            a longer queue does not hold its first outputs back until all of it is prefilled.
        quiet_slice: decode steps for which a prefill may hold up streams that run, while nobody else waits:
            less than 2, as it goes on by whole blocks and they are to be held up for two at most.
        busy_slice: the same when others wait: long enough to fill the memory that sequences leave.
        lifted_row: what carrying a row of an earlier turn through a layer that it missed takes, in rows of
            a prefill: more, as it attends by a mask rather than in order.
        newest_verification: share of the newest verification in what is known of how often drafts are
            right: as much as lets it follow a text that changes.
        verification_steps: what a verification costs, in draft steps, as it attends to all of the host.
    """

    cohort_prefills: int = 32
    quiet_slice: float = 1.3
    busy_slice: float = 4.0
    lifted_row: float = 4.5
    newest_verification: float = 0.2
    verification_steps: float = 2.0

    def __post_init__(self) -> None:
        """Raises ConfigurationError, naming the value and its range."""
        rates = ("quiet_slice", "busy_slice", "lifted_row", "verification_steps")
        check_tuning(
            "schedule",
            self,
            ("cohort_prefills", self.cohort_prefills >= 1, "1 or more"),
            ("newest_verification", 0 < self.newest_verification <= 1, "in (0, 1]"),
            *((name, 0 < getattr(self, name) < math.inf, "finite and above 0") for name in rates),
        )
