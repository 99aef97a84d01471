"""What may have to be set otherwise on other machines or for other traffic, of admission. Pure."""

import math
from dataclasses import dataclass

from workers.tuning import check_tuning


@dataclass(frozen=True, kw_only=True)
class AdmitTuning:
    """How requests wait for memory, and on which pipelines it is looked for.

    Attributes:
        patience: seconds for which a request that has no room may be overtaken by smaller ones; after that,
            room is kept for it on one pipeline, so that it waits for those that run there at most (as in
            EASY backfilling, Lifka, "The ANL/IBM SP Scheduling System", 1995).
        lookahead: requests without room behind which the queue is looked at no further: each look takes
            time of the router.
        horizon: the part of the way to its end at which each sequence is counted. Where less than the whole
            is too little, the youngest makes room for a while, which costs less than memory that waits to
            be grown into.
        length_share: the part of the last replies that were no longer than is expected of the next; when
            others are, a pipeline makes room.
        roomiest: pipelines, those with the most room, on which a request that comes is tried; afterwards it
            is on each one where something ends. With memory that far from full, or full everywhere, more
            would not find more.
        affinity: what it is worth to go where one's session is, as a part of a pipeline's memory: more room
            elsewhere draws a request away, as all that run at its home would decode more slowly.
    """

    patience: float = 4.0
    lookahead: int = 16
    horizon: float = 0.5
    length_share: float = 0.75
    roomiest: int = 4
    affinity: float = 0.5

    def __post_init__(self) -> None:
        """Raises ConfigurationError, naming the value and its range."""
        check_tuning(
            "admit",
            self,
            ("patience", 0 <= self.patience < math.inf, "finite and 0 or more"),
            ("lookahead", self.lookahead >= 0, "0 or more"),
            ("horizon", 0 < self.horizon <= 1, "in (0, 1]"),
            ("length_share", 0 < self.length_share <= 1, "in (0, 1]"),
            ("roomiest", self.roomiest >= 1, "1 or more"),
            ("affinity", 0 <= self.affinity <= 1, "in [0, 1]"),
        )
