"""What of running steps was measured rather than derived; found on CPUs. Pure."""

from dataclasses import dataclass

from workers.tuning import check_tuning


@dataclass(frozen=True, kw_only=True)
class ExecuteTuning:
    """How a shard runs steps.

    Attributes:
        block_rows: rows of a prefill that pass through a layer together: enough for products to be fast,
            and few enough for what is alive between them, and for the streams that wait for a block.
    """

    block_rows: int = 512

    def __post_init__(self) -> None:
        """Raises ConfigurationError, naming the value and its range."""
        check_tuning("execute", self, ("block_rows", self.block_rows >= 1, "1 or more"))
