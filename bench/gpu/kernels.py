"""A device's kernels against the plain calculation in fp32, on ragged shapes in poisoned memory."""

from collections import defaultdict
from typing import Any

import torch

from bench.gpu.context import Context
from workers.kernels.choose import choose_kernels
from workers.kernels.interface import Kernels
from workers.kernels.torch_kernels import TorchKernels
from workers.kv.pages import PAGE_TOKENS, pages_for
from workers.kv.pool import PagedBatch
from workers.model.attention import window_weights

CPU = torch.device("cpu")
# Heads, KV heads, head size: a key for each head, for groups of them, for all.
HEADS = ((8, 8, 64), (8, 2, 128), (4, 1, 64))
# What rounding to a type on the way may leave, of values about 1.
TOLERANCES = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Rows, pages and lengths.
Paged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# What an operation is called, what it gave, and what it should have.
Pairs = list[tuple[str, torch.Tensor, torch.Tensor]]


def kernels(context: Context, results: dict[str, Any]) -> None:
    """The largest error of every operation, by type, and whether rounding explains it."""
    reference = TorchKernels(torch.float32)
    for dtype, tolerance in TOLERANCES.items():
        own = choose_kernels("auto", context.device, dtype)
        errors: dict[str, float] = defaultdict(float)
        for number, (heads, kv_heads, size) in enumerate(HEADS):
            draw = torch.Generator().manual_seed(number)
            pairs = [
                *_dense(own, reference, context.device, dtype, draw),
                *_prefill(own, reference, context.device, dtype, draw, (heads, kv_heads, size)),
                *_decode(own, reference, context.device, dtype, draw, (heads, kv_heads, size)),
            ]
            for what, got, expected in pairs:
                difference = (got.cpu().float() - expected).abs() / (1 + expected.abs())
                # Poison that was read is NaN, which no comparison would find.
                errors[what] = max(errors[what], float(difference.nan_to_num(nan=torch.inf).max()))
        results[str(dtype).removeprefix("torch.")] = {
            "backend": type(own).__name__,
            "errors": {what: float(f"{error:.2e}") for what, error in errors.items()},
            "ok": all(error <= tolerance for error in errors.values()),
        }
        context.flush()
    results["ok"] = all(each["ok"] for each in results.values())


def _dense(
    own: Kernels, reference: Kernels, device: torch.device, dtype: torch.dtype, draw: torch.Generator
) -> Pairs:
    pairs: Pairs = []
    for rows in (1, 5, 70):
        x = torch.randn(rows, 96, generator=draw).to(own.activations)
        weight = torch.randn(64, 96, generator=draw).to(dtype) / 96**0.5
        norm = torch.randn(96, generator=draw).to(dtype)
        plain = x.float()
        there, weight_there = x.to(device), weight.to(device)
        pairs += [
            (
                "linear",
                own.linear(there, weight_there, None),
                reference.linear(plain, weight.float(), None),
            ),
            ("logits", own.logits(there, weight_there), reference.logits(plain, weight.float())),
            (
                "rms_norm",
                own.rms_norm(there, norm.to(device), 1e-5),
                reference.rms_norm(plain, norm.float(), 1e-5),
            ),
            ("silu_product", own.silu_product(there.clone()), reference.silu_product(plain.clone())),
        ]
    return pairs


def _prefill(
    own: Kernels,
    reference: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    draw: torch.Generator,
    shape: tuple[int, int, int],
) -> Pairs:
    heads, kv_heads, size = shape
    pairs: Pairs = []
    for rows, before, window in ((1, 0, 0), (37, 0, 8), (64, 100, 20), (130, 3, 130)):
        projected = torch.randn(rows, heads + 2 * kv_heads, size, generator=draw).to(own.activations)
        angles = torch.randn(rows, size // 2, generator=draw)
        rotation = (angles.cos(), angles.sin())
        there = own.rotate(
            projected.to(device), (rotation[0].to(device), rotation[1].to(device)), heads, kv_heads
        )
        plain = reference.rotate(projected.float(), rotation, heads, kv_heads)
        pairs += [("rotate", got, expected) for got, expected in zip(there, plain, strict=True)]
        query, new = (part.cpu().float() for part in there)
        kv = torch.cat((torch.randn(before, 2, kv_heads, size, generator=draw).to(dtype).float(), new))
        weights = window_weights(window, 1.2, CPU)
        context = before + rows - window if window else 0
        got_both = own.prefill_attention(there[0], kv.to(dtype).to(device), weights.to(device), context)
        expected_both = reference.prefill_attention(query, kv, weights, context)
        pairs += [
            (what, got, expected)
            for what, got, expected in zip(
                ("prefill_attention", "window_scores"), got_both, expected_both, strict=True
            )
            if expected.numel()
        ]
    return pairs


def _decode(
    own: Kernels,
    reference: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    draw: torch.Generator,
    shape: tuple[int, int, int],
) -> Pairs:
    heads, kv_heads, size = shape
    lengths = [1, 15, 16, 17, 300, 1000]
    query = torch.randn(len(lengths), heads, size, generator=draw).to(own.activations)
    paged = _poisoned(lengths, (2, kv_heads, size), dtype, draw)
    spilled = _poisoned([0, 3, 0, 40, 16, 200], (2, kv_heads, size), dtype, draw)
    pairs: Pairs = []
    for tail, more in ((0, None), (20, None), (0, spilled)):
        there, plain = _batch(paged, more, device, dtype), _batch(paged, more, CPU, torch.float32)
        got = own.decode_attention(query.to(device), there, tail)
        expected = reference.decode_attention(query.float(), plain, tail)
        pairs.append(("decode_attention, spilled" if more else "decode_attention", got[0], expected[0]))
        if tail:
            pairs.append(("shares", got[1], expected[1]))
    return pairs


def _batch(paged: Paged, spilled: Paged | None, device: torch.device, dtype: torch.dtype) -> PagedBatch:
    """``paged`` on ``device``; what is ``spilled`` stays in host memory."""
    rows, pages, lengths = paged
    more = PagedBatch(spilled[0].to(dtype), *spilled[1:]) if spilled else None
    return PagedBatch(rows.to(device, dtype), pages.to(device), lengths.to(device), more)


def _poisoned(lengths: list[int], row: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> Paged:
    """A pool with caches of ``lengths`` in pages in any order, NaN in all other rows; and their tables."""
    counts = [pages_for(length) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=draw)
    rows = torch.full((len(order) * PAGE_TOKENS, *row), float("nan"), dtype=dtype)
    # Beyond a sequence's own there is a page that nobody owns.
    pages = torch.full((len(lengths), max(counts)), int(order[-1]), dtype=torch.int32)
    at = 0
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = order[at : at + count]
        at += count
        pages[number, :count] = own.int()
        slots = torch.arange(length)
        places = own[slots // PAGE_TOKENS] * PAGE_TOKENS + slots % PAGE_TOKENS
        rows[places] = torch.randn(length, *row, generator=draw).to(dtype)
    return rows, pages, torch.tensor(lengths, dtype=torch.int32)
