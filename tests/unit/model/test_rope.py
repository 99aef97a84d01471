"""Rotations of positions however large, and of keys that move."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from toy import CONTEXT

from workers.model.config import read_config
from workers.model.rope import Rope


@pytest.fixture(params=["gqa", "yarn", "longrope", "phi3-partial"])
def rope(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Rope:
    folder = toy(request.param)
    return Rope(folder, read_config(folder), torch.device("cpu"))


@pytest.mark.parametrize("far", [CONTEXT, 10**5, 10**6, 10**9])
def test_rows_far_beyond_the_context_are_as_far_apart_as_others(far: int, rope: Rope) -> None:
    """By what attention sees of them: the cosines and sines of their distance."""
    places = np.array([0, 1, 7, 100])
    near, beyond = (_complex(rope, first + places) for first in (0, far))
    assert torch.allclose(near[0].conj() * near, beyond[0].conj() * beyond, atol=1e-5)


@pytest.mark.parametrize("distance", [-90, 0, 3, 10**6])
def test_keys_that_are_turned_are_what_they_would_be_there(distance: int, rope: Rope) -> None:
    keys, places = torch.randn(4, 2, 16), np.array([90, 91, 120, 150])
    here, there = (_rotated(rope, keys, each) for each in (places, places + distance))
    assert torch.allclose(rope.turned(here, np.full(4, distance), 10), there, atol=1e-5)


def _complex(rope: Rope, positions: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.complex(*rope.rotation(positions, [(len(positions), 10)]))


def _rotated(rope: Rope, keys: torch.Tensor, positions: npt.NDArray[np.int64]) -> torch.Tensor:
    turned = torch.complex(*keys.chunk(2, dim=-1)) * _complex(rope, positions)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)
