"""Where a shard's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by what they went to: "gemm", "attention", "elementwise" and "selection".

    What is left of a step is Python's and torch's own. On a GPU, where calls return before they are
    done, this says little.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Adds the time of the block to ``what``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began
