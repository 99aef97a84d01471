"""Percentiles are values that occurred."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.percentile import percentile


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(1, 100))
def test_they_are_the_inverse_of_the_distribution(values: list[int], share: int) -> None:
    assert percentile(values, share) == np.percentile(values, share, method="inverted_cdf")


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [((), 99, 0.0), ((3.0,), 99, 3.0), ((1.0, 1.0), 99, 1.0), ((1.0, 2.0, 3.0, 4.0), 50, 2.0)],
)
def test_of_few_values(values: tuple[float, ...], share: int, expected: float) -> None:
    assert percentile(values, share) == expected
