"""Shares of sums, with bootstrap intervals (Efron and Tibshirani, 1993, chapter 13). Pure."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

AGAIN, SEED = 2000, 1
# A question is counted where its context makes the answer likelier by so many nats to the full cache.
LEAST_GAIN = 0.5
# What a text says of a part and of the whole.
Pair = tuple[float, float]


class Interval(NamedTuple):
    """A value, and between what it is in 95 % of the samples that are drawn of the same texts."""

    value: float
    low: float
    high: float


def helped(pairs: Iterable[Pair]) -> list[Pair]:
    """Those whose context helps the baseline, which is their second number."""
    return [(own, full) for own, full in pairs if full >= LEAST_GAIN]


def share(pairs: Sequence[Pair]) -> Interval:
    """The sum of the parts over that of the wholes; there is one at least."""
    return mean_share([pairs])


def mean_share(groups: Iterable[Sequence[Pair]]) -> Interval:
    """The mean over groups of such shares; each group's pairs are drawn anew from itself."""
    values, drawn = zip(*(_shares(pairs, group) for group, pairs in enumerate(groups)), strict=True)
    low, high = np.percentile(np.mean(drawn, axis=0), (2.5, 97.5))
    return Interval(float(np.mean(values)), float(low), float(high))


def _shares(pairs: Sequence[Pair], group: int) -> tuple[float, npt.NDArray[np.float64]]:
    """The share, and those of the samples [AGAIN]."""
    parts, wholes = np.array(pairs, np.float64).T
    rows = _drawn(len(pairs), group)
    return parts.sum() / wholes.sum(), parts[rows].sum(axis=1) / wholes[rows].sum(axis=1)


@lru_cache(maxsize=64)
def _drawn(count: int, group: int) -> npt.NDArray[np.int64]:
    """Which pairs are drawn, the same in all cells, which are compared alike: int64 [AGAIN, count]."""
    return np.random.default_rng((SEED, group)).integers(count, size=(AGAIN, count))
