"""What may have to be set otherwise on other machines, of the router. Pure."""

import math
from dataclasses import dataclass

from workers.tuning import check_tuning


@dataclass(frozen=True, kw_only=True)
class RouteTuning:
    """How often clients are told of output, and pipelines that have refused are tried again.

    Attributes:
        messages_per_core: messages to clients a second, of all streams together, for each core of the
            router's machine: they take cores that engines may need.
        longest_spacing: seconds that tokens wait at most to be told together, however many streams there
            are: readers notice longer.
        refusal_pause: seconds until a pipeline is tried again that had no room although nothing of the
            router's ran there; nothing that ends there will tell.
    """

    messages_per_core: float = 75.0
    longest_spacing: float = 0.25
    refusal_pause: float = 0.1

    def __post_init__(self) -> None:
        """Raises ConfigurationError, naming the value and its range."""
        check_tuning(
            "route",
            self,
            ("messages_per_core", 0 < self.messages_per_core < math.inf, "finite and above 0"),
            ("longest_spacing", 0 <= self.longest_spacing < math.inf, "finite and 0 or more"),
            ("refusal_pause", 0 < self.refusal_pause < math.inf, "finite and above 0"),
        )
