"""What became of a sequence's spilled KV, in bytes. Pure."""

from dataclasses import dataclass


@dataclass
class SpillCounts:
    """Bytes that were spilled, read back, dropped for want of room, and attended to in place."""

    spilled_bytes: int = 0
    recalled_bytes: int = 0
    dropped_bytes: int = 0
    attended_bytes: int = 0

    def plus(self, other: "SpillCounts") -> "SpillCounts":
        """Both together."""
        return SpillCounts(
            self.spilled_bytes + other.spilled_bytes,
            self.recalled_bytes + other.recalled_bytes,
            self.dropped_bytes + other.dropped_bytes,
            self.attended_bytes + other.attended_bytes,
        )
