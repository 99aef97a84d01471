"""Whole numbers of any type, in the range of the wire."""

import operator
from typing import SupportsIndex

from pyramidserve.errors import InvalidRequestError

INT32_MAX = 2**31 - 1


def whole_number(name: str, value: SupportsIndex, low: int = 0, high: int = INT32_MAX) -> int:
    """``value`` as an int of the wire.

    Raises:
        InvalidRequestError: it is not a whole number in [low, high].
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise InvalidRequestError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    return number
