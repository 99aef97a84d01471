"""Keys and values become rows and come back, as near as the format is fine, and then stay as they are."""

import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.budget.kv_format import KV_FORMATS
from workers.budget.pages import PAGE_TOKENS
from workers.kv.pool import KVPool
from workers.kv.rows import (
    LEVELS_INT4,
    bytes_as_rows,
    decode,
    encode,
    hadamard,
    head_size_of,
    row_dtype,
    row_shape,
)

# How far a number may be from what it was, beside the greatest of its head.
NEAR = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-10, "int8": 0.6 / 127, "int4": 0.6}
names = st.sampled_from([*KV_FORMATS])
sizes = st.sampled_from([8, 16, 64, 80, 96, 128])


def some(seed: int, *shape: int) -> torch.Tensor:
    """Keys a few of whose channels are far greater than the others, and one token of zeros."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(*shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()
    kv[0] = 0
    return kv


@given(st.integers(0, 2**32), names, sizes, st.floats(-20, 20))
def test_what_comes_back_is_near_and_becomes_the_same_row_again(
    seed: int, name: str, size: int, magnitude: float
) -> None:
    kv = some(seed, 20, 2, 3, size)
    if name != "float16":
        kv *= 2.0**magnitude
    dtype = row_dtype(name)
    rows = encode(kv, dtype)
    assert rows.dtype == dtype
    assert rows.shape[1:] == row_shape(3, size, dtype)
    assert rows[0].nbytes == KV_FORMATS[name].row_bytes(3, size)
    assert head_size_of(rows) == size
    back = decode(rows)
    greatest = kv.abs().amax(dim=-1, keepdim=True)
    if name == "int4":  # rounded where channels are mixed
        greatest = (kv @ hadamard(size, kv.device)).norm(dim=-1, keepdim=True)
    assert ((back.float() - kv).abs() <= NEAR[name] * greatest + 1e-30).all()
    assert torch.equal(encode(back, dtype), rows)


def test_mixing_channels_is_what_four_bits_live_on() -> None:
    """Keys with a few great channels lose no more than keys without."""
    kv = some(3, 400, 2, 2, 64)[1:]
    mixed = (decode(encode(kv, torch.uint8)) - kv).norm() / kv.norm()
    assert mixed < 0.12
    matrix = hadamard(64, kv.device)
    plain = (decode(encode(kv @ matrix, torch.uint8)) - kv @ matrix).norm() / kv.norm()  # mixed back
    assert plain > 1.5 * mixed


@given(sizes)
def test_the_matrix_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_none_when_it_comes_back(name: str, bad: float) -> None:
    kv = some(5, 2, 2, 1, 16)[1:]
    kv[0, 0, 0, 3] = bad
    back = decode(encode(kv, row_dtype(name)))
    assert not back[0, 0].isfinite().all()
    assert torch.allclose(back[0, 1], kv[0, 1], atol=0.2 * float(kv[0, 1].norm()))


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_pool_takes_as_many_bytes_as_its_format_says(name: str) -> None:
    pool = KVPool(3, 3, 64, row_dtype(name), torch.device("cpu"))
    assert pool.rows.nbytes == 3 * pool.page_bytes
    assert pool.page_bytes == KV_FORMATS[name].page_bytes(3, 64)
    assert pool.page_bytes == PAGE_TOKENS * KV_FORMATS[name].row_bytes(3, 64)


@settings(max_examples=examples(30))
@given(names, st.integers(1, 5), st.integers(1, 700))
def test_any_bytes_lie_in_rows(name: str, count: int, size: int) -> None:
    like = torch.empty(0, *row_shape(2, 16, row_dtype(name)), dtype=row_dtype(name))
    values = torch.arange(count * size, dtype=torch.int64).to(torch.uint8).view(count, size)
    rows = bytes_as_rows(values, like)
    assert rows.shape[1:] == like.shape[1:]
    assert torch.equal(rows.view(torch.uint8).view(count, -1)[:, :size], values)


def test_codes_of_four_bits_stand_for_what_is_nearest_to_normal_numbers() -> None:
    """Each but the ends is the mean of what becomes it, as no other levels would have less of an error."""
    numbers = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    greatest = numbers.abs().amax(dim=-1, keepdim=True)
    levels = torch.tensor(LEVELS_INT4) / LEVELS_INT4[-1]
    codes = torch.bucketize(numbers / greatest, (levels[1:] + levels[:-1]) / 2)
    weights = greatest.square().expand_as(numbers)
    for code, level in enumerate(levels[1:-1], 1):
        own = weights * (codes == code)
        assert abs((own * numbers / greatest).sum() / own.sum() - level) < 0.004
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels.bfloat16().float(), levels)
