"""What any part of the measurement is, and what it hands on."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pyramidserve.types import Compression
from workers.bench.cell import Holding
from workers.bench.facts import Asking

# As JSON has it.
Record = dict[str, Any]
# Is told how many tokens of prompts have been read.
Done = Callable[[int], None]
FULL = Compression()
# Passages that an engine reads at once.
AT_ONCE = 16


class Read(Protocol):
    """How likely a passage's output was; see ``Likelihood``."""

    @property
    def log_probabilities(self) -> Sequence[float]: ...
    @property
    def likeliest(self) -> Sequence[int]: ...
    @property
    def kept(self) -> float: ...


class Part(Protocol):
    """What is measured of a cell.

    Attributes:
        prompt_tokens: that a cell reads, about.
        longest: tokens of its longest sequence, at most.
    """

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def longest(self) -> int: ...

    def begin(self, asking: Asking) -> None:
        """Asks the baseline's engine what all cells share, before anything is measured."""
        ...

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        """What is found; ``full`` is what the baseline has found, None where this is the baseline."""
        ...
