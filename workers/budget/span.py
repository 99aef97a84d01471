"""Some of a prompt's tokens, one behind the other. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The tokens from ``first`` on, up to the one before ``end``."""

    first: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.first
