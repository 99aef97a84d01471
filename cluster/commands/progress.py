"""A bar at the terminal."""

import sys
import time

WIDTH = 30


class Progress:
    """How much of something lengthy is done; where nobody looks on, nothing is shown."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began = max(1, total), 0, time.perf_counter()
        self._shown = sys.stderr.isatty()

    def __call__(self, more: int, what: str) -> None:
        """``more`` of the total is done, at ``what``."""
        self._done += more
        if self._shown:
            share = min(1.0, self._done / self._total)
            bar = "█" * round(WIDTH * share)
            print(f"\r{bar:·<{WIDTH}} {share:.0%} {what}\x1b[K", end="", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds that the rest takes at this pace."""
        spent = time.perf_counter() - self._began
        return spent * (self._total - self._done) / max(1, self._done)

    def clear(self) -> None:
        """Makes room for a line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
