"""What of the plain kernels was measured rather than derived: on CPUs, but for what names a card. Pure."""

from dataclasses import dataclass, fields

from workers.tuning import check_tuning


@dataclass(frozen=True, kw_only=True)
class ReferenceTuning:
    """How much the kernels in plain torch hold at once, beside their results.

    Attributes:
        gather_bytes: KV gathered in a decode step, unless one sequence alone has more: what a cache holds.
        card_gather_bytes: the same on a GPU, where another gathering costs some thirty launches.
        score_rows: rows of the recent window scored at once: bounds their probabilities.
        widened_columns: of the vocabulary, in a product that is widened to fp32: a small part of the head.
    """

    gather_bytes: int = 32 << 20
    card_gather_bytes: int = 1 << 30
    score_rows: int = 128
    widened_columns: int = 1024

    def __post_init__(self) -> None:
        """Raises ConfigurationError, naming the value and its range."""
        check_tuning(
            "reference",
            self,
            *((each.name, getattr(self, each.name) >= 1, "1 or more") for each in fields(self)),
        )
