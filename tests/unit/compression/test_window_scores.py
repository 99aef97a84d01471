"""Attention and the scores that are read off it, against a plain calculation in double precision."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv.pages import PAGE_TOKENS, pages_for
from workers.kv.pool import PagedBatch
from workers.model import attention
from workers.model.attention import decode_attention, prefill_attention, window_scores

Array = npt.NDArray[np.float64]

HEAD_SIZE = 8
# (heads, KV heads): one key for each head, for groups of heads, for all of them.
HEADS = [(4, 4), (6, 2), (4, 1), (1, 1)]
heads = st.sampled_from(HEADS)
seeds = st.integers(0, 2**32)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def scattered(seed: int, lengths: list[int], kv_heads: int) -> tuple[PagedBatch, list[torch.Tensor]]:
    """Caches of these lengths on pages in any order, among NaN; and the caches as they are."""
    width, count = max(map(pages_for, lengths)), sum(map(pages_for, lengths))
    order = torch.randperm(count + 1, generator=torch.Generator().manual_seed(seed))
    free, taken = order[0], iter(order[1:])
    pool = torch.full(((count + 1) * PAGE_TOKENS, 2, kv_heads, HEAD_SIZE), torch.nan)
    pages = torch.full((len(lengths), width), int(free), dtype=torch.int32)
    caches = draw(seed + 1, *((length, 2, kv_heads, HEAD_SIZE) for length in lengths))
    for row, cache in enumerate(caches):
        for index, part in enumerate(torch.split(cache, PAGE_TOKENS)):
            pages[row, index] = next(taken)
            first = pages[row, index] * PAGE_TOKENS
            pool[first : first + len(part)] = part
    return PagedBatch(pool, pages, torch.tensor(lengths, dtype=torch.int32)), caches


def naive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Iterable[int]
) -> tuple[Array, Array]:
    """Per row, which sees the first ``visible`` keys: the output, and the probabilities per head."""
    group = query.shape[1] // key.shape[1]
    # In numpy, as torch's threads take their time over small matrices on a busy machine.
    queries, keys, values = (each.double().numpy() for each in (query, key, value))
    keys, values = keys.repeat(group, axis=1), values.repeat(group, axis=1)
    outputs = np.zeros(queries.shape)
    probabilities = np.zeros((*queries.shape[:2], len(keys)))
    for row, end in enumerate(visible):
        powers = np.exp(np.einsum("hd,nhd->hn", queries[row], keys[:end]) / HEAD_SIZE**0.5)
        probabilities[row, :, :end] = powers / powers.sum(axis=1, keepdims=True)
        outputs[row] = np.einsum("hn,nhd->hd", probabilities[row, :, :end], values[:end])
    return outputs.reshape(len(outputs), -1), probabilities


def close(ours: torch.Tensor, theirs: Array) -> bool:
    return ours.dtype == torch.float32 and np.allclose(ours.numpy(), theirs, atol=2e-6, rtol=2e-5)


@given(seeds, heads, st.integers(1, 20))
@settings(deadline=None)
def test_a_prompt_attends_to_itself_causally(seed: int, heads: tuple[int, int], tokens: int) -> None:
    shapes = [(tokens, count, HEAD_SIZE) for count in (heads[0], heads[1], heads[1])]
    query, key, value = draw(seed, *shapes)
    expected, _ = naive(query, key, value, range(1, tokens + 1))
    assert close(prefill_attention(query, key, value), expected)


def check_scores(seed: int, heads: tuple[int, int], tokens: int, window: int, weight: float) -> None:
    query, key = draw(seed, (window, heads[0], HEAD_SIZE), (tokens, heads[1], HEAD_SIZE))
    _, probabilities = naive(query, key, key, range(tokens - window + 1, tokens + 1))
    weights = np.linspace(1, weight, window)
    expected = weights @ probabilities.mean(axis=1)[:, : tokens - window]
    scores = window_scores(query, key, weight)
    assert scores.shape == (tokens - window,)
    assert close(scores, expected)


@given(seeds, heads, st.integers(1, 16), st.integers(0, 16), st.floats(0.5, 3), st.integers(1, 6))
@settings(deadline=None)
def test_scores_are_the_weighted_attention_of_the_window(
    seed: int, heads: tuple[int, int], window: int, context: int, weight: float, rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORE_ROWS", rows)
        check_scores(seed, heads, context + window, window, weight)


@pytest.mark.parametrize("window", [128, 129, 260])
def test_long_windows_are_scored_in_slices(window: int) -> None:
    assert window >= attention.SCORE_ROWS
    check_scores(3, (2, 1), window + 5, window, 1.2)


@given(seeds, heads, st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 40_000))
@settings(deadline=None)
def test_a_step_attends_to_each_cache_up_to_its_length(
    seed: int, heads: tuple[int, int], lengths: list[int], gathered_bytes: int
) -> None:
    (query,) = draw(seed, (len(lengths), heads[0], HEAD_SIZE))
    batch, caches = scattered(seed, lengths, heads[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "GATHER_BYTES", gathered_bytes)
        outputs, probabilities = decode_attention(query, batch)
    assert probabilities.shape == (len(lengths), max(lengths))
    for row, (length, kv) in enumerate(zip(lengths, caches, strict=True)):
        expected, shares = naive(query[row : row + 1], kv[:, 0], kv[:, 1], [length])
        assert close(outputs[row], expected[0])
        assert close(probabilities[row, :length], shares[0].mean(axis=0))
        assert not probabilities[row, length:].any()
