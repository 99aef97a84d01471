"""How keys and values become rows of a pool, and rows keys and values again.

A row is [2, KV heads, width]. Where it is of a floating point type its numbers are what they are. Rows of
int8 hold codes of 8 bits, rows of uint8 two codes of 4 bits in a byte; behind the codes of each head's key,
or value, lie the two bytes of its scale, in bfloat16. To encode what was decoded, in fp32, gives the same
row: KV may go back and forth as often as it will.
"""

import math
from functools import lru_cache

import torch
from torch.nn import functional

from workers.budget.kv_format import KV_FORMATS, KVFormat

# The type of rows tells their format.
_ROW_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_FORMATS = {dtype: KV_FORMATS[name] for name, dtype in _ROW_DTYPES.items()}
# Of codes, what a head must be a multiple of, so that rows begin where numbers of four bytes may.
WHOLE_WORDS = 4
_GREATEST_INT8 = 127
# Codes of 4 bits stand for so many scales, the last for a head's greatest number. Mixed channels are as if
# drawn from a normal distribution, and beside the greatest of 64 such numbers these have the least squared
# error (Lloyd's method); those of NF4 (QLoRA, arXiv 2305.14314, section 3), equally likely ones, have more.
# All are exact in bfloat16.
_HALF = (12, 37, 62, 89, 119, 154, 197, 256)
LEVELS_INT4 = (*(-level for level in reversed(_HALF)), *_HALF)


def row_dtype(name: str) -> torch.dtype:
    """The type of rows in the format of that name."""
    return _ROW_DTYPES[name]


def row_format(dtype: torch.dtype) -> KVFormat:
    """The format of rows of that type."""
    return _FORMATS[dtype]


def row_shape(kv_heads: int, head_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Of one row of that type."""
    return 2, kv_heads, row_format(dtype).head_bytes(head_size) // dtype.itemsize


def encode(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of ``dtype`` with ``kv`` [..., head size]: [..., width]."""
    if dtype.is_floating_point:
        return kv.to(dtype)
    numbers = kv.float()
    if dtype == torch.uint8:
        numbers = numbers @ hadamard(kv.shape[-1], kv.device)
    greatest = _GREATEST_INT8 if dtype == torch.int8 else LEVELS_INT4[-1]
    scale = (numbers.abs().amax(dim=-1, keepdim=True) / greatest).to(torch.bfloat16)
    codes = numbers / torch.where(scale == 0, 1, scale).float()
    if dtype == torch.int8:
        codes = codes.round_().clamp_(-greatest, greatest).to(torch.int8)
    else:
        nearest = _nearest_codes(kv.device)
        halves = codes.mul_(2).ceil_().add_(2 * greatest).int().clamp_(0, len(nearest) - 1)
        low, high = nearest.index_select(0, halves.flatten()).view(halves.shape).chunk(2, dim=-1)
        codes = low | high << 4
    return torch.cat((codes, scale.view(dtype)), dim=-1)


def decode(rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys and values in ``rows`` [..., width]: [..., head size].

    Of rows of codes they come in ``dtype``; others are returned as they are.
    """
    if rows.dtype.is_floating_point:
        return rows
    codes, scale = rows[..., :-2], rows[..., -2:].contiguous().view(torch.bfloat16).float()
    if rows.dtype == torch.int8:
        return (codes * scale).to(dtype)
    numbers = _levels(rows.device)[torch.cat((codes & 15, codes >> 4), dim=-1).int()].mul_(scale)
    return (numbers @ hadamard(numbers.shape[-1], rows.device)).to(dtype)


def recoded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``rows`` [..., width] as rows of ``dtype``."""
    return rows if rows.dtype == dtype else encode(decode(rows), dtype)


@lru_cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS_INT4, dtype=torch.float32, device=device)


@lru_cache
def _nearest_codes(device: torch.device) -> torch.Tensor:
    """Of what is over every half scale but at most the next, from below the least level on: uint8.

    Levels are whole, so that what lies in the middle of two is a half of a scale.
    """
    levels, most = torch.tensor(LEVELS_INT4), LEVELS_INT4[-1]
    middles = levels[1:] + levels[:-1]
    return torch.bucketize(torch.arange(-2 * most, 2 * most + 1), middles).to(device, torch.uint8)


@lru_cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """An orthogonal matrix that is its own inverse, fp32 [size, size]: it spreads what few channels have.

    Hadamard's (QuaRot, arXiv 2404.00456, section 4), of each part of the greatest power of two that divides
    ``size``.
    """
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.kron(torch.eye(size // block), matrix * block**-0.5).to(device)


def head_size_of(rows: torch.Tensor) -> int:
    """Numbers of each head's key, and value, in ``rows`` [..., width]."""
    if rows.dtype.is_floating_point:
        return rows.shape[-1]
    form = row_format(rows.dtype)
    return (rows.shape[-1] - form.scale_bytes) * 8 // form.bits


def bytes_as_rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows with the bytes of ``values`` [n, m], each over as many as it needs: [n * rows of each, ...].

    Args:
        like: [*, 2, KV heads, width], as the rows are to be.
    """
    each = values.contiguous().view(torch.uint8)
    padded = functional.pad(each, (0, -each.shape[1] % (math.prod(like.shape[1:]) * like.dtype.itemsize)))
    return padded.view(like.dtype).view(-1, *like.shape[1:])


def rows_as_bytes(rows: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The first ``size`` values of ``dtype`` that lie in each of ``rows`` [..., 2, KV heads, width]."""
    return rows.flatten(-3).view(torch.uint8)[..., : size * dtype.itemsize].contiguous().view(dtype)
