"""A device's kernels against the plain calculation in fp32, on ragged shapes in poisoned memory."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.context import Context
from workers.backends.attention import row_weights
from workers.backends.interface import Backend
from workers.backends.reference import ReferenceBackend
from workers.budget.observation import RowAttention
from workers.budget.pages import PAGE_TOKENS, pages_for
from workers.engine.choose import choose_backend
from workers.kv.pool import PagedBatch

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend(torch.float32)
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
    for dtype, tolerance in TOLERANCES.items():
        own = choose_backend("auto", context.device, dtype)
        errors: dict[str, float] = defaultdict(float)
        for number, (heads, kv_heads, size) in enumerate(HEADS):
            draw = torch.Generator().manual_seed(number)
            case = Case(own, context.device, dtype, heads, kv_heads, size, draw)
            for what, got, expected in (*case.dense(), *case.prefill(), *case.decode()):
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


@dataclass(frozen=True)
class Case:
    """Kernels on a device, and what they are given: of a type, of some heads, drawn."""

    own: Backend
    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    size: int
    generator: torch.Generator

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def dense(self) -> Pairs:
        """Products, norms and activations."""
        own, pairs = self.own, []
        for rows in (1, 5, 70):
            x = self.draw(rows, 96).to(own.activations)
            weight = self.draw(64, 96).to(self.dtype) / 96**0.5
            norm = self.draw(96).to(self.dtype)
            plain, wide = x.float(), weight.float()
            there, weight_there, norm_there = (part.to(self.device) for part in (x, weight, norm))
            gated = own.silu_product(there.clone()), REFERENCE.silu_product(plain.clone())
            normed = own.rms_norm(there, norm_there, 1e-5), REFERENCE.rms_norm(plain, norm.float(), 1e-5)
            pairs += [
                ("linear", own.linear(there, weight_there, None), REFERENCE.linear(plain, wide, None)),
                ("logits", own.logits(there, weight_there), REFERENCE.logits(plain, wide)),
                ("rms_norm", *normed),
                ("silu_product", *gated),
            ]
        return pairs

    def prefill(self) -> Pairs:
        """Rotations, attention of a block of rows, and the scores that are read off it."""
        own, pairs = self.own, []
        for rows, before, window in ((1, 0, 0), (37, 0, 8), (64, 100, 20), (130, 3, 130)):
            projected = self.draw(rows, self.heads + 2 * self.kv_heads, self.size).to(own.activations)
            angles = self.draw(rows, self.size // 2)
            cos, sin = angles.cos(), angles.sin()
            rotation = cos.to(self.device), sin.to(self.device)
            there = own.rotate(projected.to(self.device), rotation, self.heads, self.kv_heads)
            plain = REFERENCE.rotate(projected.float(), (cos, sin), self.heads, self.kv_heads)
            pairs += [("rotate", got, expected) for got, expected in zip(there, plain, strict=True)]
            query, new = (part.cpu().float() for part in there)
            past = self.draw(before, 2, self.kv_heads, self.size).to(self.dtype).float()
            kv, weights = torch.cat((past, new)), row_weights(RowAttention(window, 1.2), window, CPU)
            scored = before + rows - window if window else 0
            stored = kv.to(self.device, self.dtype)
            got = own.prefill_attention(there[0], stored, weights.to(self.device), scored)
            expected = REFERENCE.prefill_attention(query, kv, weights, scored)
            pairs.append(("prefill_attention", got[0], expected[0]))
            if scored:
                pairs.append(("window_scores", got[1], expected[1]))
        return pairs

    def decode(self) -> Pairs:
        """Attention of a step over paged caches, on the device and in host memory."""
        lengths, row = [1, 15, 16, 17, 300, 1000], (2, self.kv_heads, self.size)
        query = self.draw(len(lengths), self.heads, self.size).to(self.own.activations)
        paged = _poisoned(lengths, row, self.dtype, self.generator)
        spilled = _poisoned([0, 3, 0, 40, 16, 200], row, self.dtype, self.generator)
        pairs: Pairs = []
        for tail, more in ((0, None), (20, None), (0, spilled)):
            there = _batch(paged, more, self.device, self.dtype)
            plain = _batch(paged, more, CPU, torch.float32)
            got = self.own.decode_attention(query.to(self.device), there, tail)
            expected = REFERENCE.decode_attention(query.float(), plain, tail)
            name = "decode_attention, spilled" if more else "decode_attention"
            pairs += [(name, got.out, expected.out), ("lse", got.lse, expected.lse)]
            if tail:
                pairs.append(("shares", got.shares, expected.shares))
        return pairs


def _batch(paged: Paged, spilled: Paged | None, device: torch.device, dtype: torch.dtype) -> PagedBatch:
    """``paged`` on ``device``; what is ``spilled`` stays in host memory."""
    rows, pages, lengths = paged
    more = PagedBatch(spilled[0].to(dtype), *spilled[1:]) if spilled else None
    return PagedBatch(rows.to(device, dtype), pages.to(device), lengths.to(device), spilled=more)


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
