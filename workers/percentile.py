"""The percentiles that everything here is told in. Pure."""

import math
from collections.abc import Iterable


def percentile(values: Iterable[float], share: int) -> float:
    """The smallest of ``values`` that ``share`` per cent of them do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)] if ordered else 0.0
