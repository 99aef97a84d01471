"""How far property tests look: `make test` tries the same examples each time, `make fuzz` others."""

import os

# `make fuzz` sets it.
FACTOR = int(os.environ.get("FUZZ", "1"))


def examples(count: int) -> int:
    """How many examples to try of a property that `make test` tries ``count`` of, at most 300."""
    return count * FACTOR
