"""Attention and the scores that are read off it, against a plain calculation in double precision."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.backends.attention import low_counts, prefill_attention, row_weights, window_scores
from workers.budget.observation import RowAttention

Array = npt.NDArray[np.float64]

HEAD_SIZE = 8
# (heads, KV heads): one key for each head, for groups of heads, for all of them.
HEADS = [(4, 4), (6, 2), (4, 1), (1, 1)]
heads = st.sampled_from(HEADS)
seeds = st.integers(0, 2**32)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


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


@given(seeds, heads, st.integers(1, 20), st.integers(0, 20))
def test_rows_attend_to_all_before_them(seed: int, heads: tuple[int, int], rows: int, before: int) -> None:
    tokens = before + rows
    shapes = [(rows, heads[0], HEAD_SIZE), (tokens, heads[1], HEAD_SIZE), (tokens, heads[1], HEAD_SIZE)]
    query, key, value = draw(seed, *shapes)
    expected, _ = naive(query, key, value, range(before + 1, tokens + 1))
    assert close(prefill_attention(query, key, value), expected)


def check_scores(
    seed: int, heads: tuple[int, int], tokens: int, window: int, weight: float, at_once: int, decay: float
) -> None:
    query, key = draw(seed, (window, heads[0], HEAD_SIZE), (tokens, heads[1], HEAD_SIZE))
    _, probabilities = naive(query, key, key, range(tokens - window + 1, tokens + 1))
    weights = np.linspace(1, weight, window) * decay ** np.arange(window - 1, -1, -1)
    groups = probabilities.reshape(window, heads[1], -1, tokens)
    context = tokens - window // 2  # what the oldest rows do not see yet gets nothing from them
    expected = np.einsum("r,rgqn->gn", weights, groups)[:, :context] / groups.shape[2]
    weighted = row_weights(RowAttention(window, weight, decay), window, torch.device("cpu"))
    scores = window_scores(query, key, weighted, context, at_once)
    assert scores.shape == (heads[1], context)
    assert close(scores, expected)
    greatest = window_scores(query, key, weighted, context, at_once, greatest=True)
    assert close(greatest, (groups * weights[:, None, None, None]).max(axis=(0, 2))[:, :context])
    seen = np.arange(tokens)[None, :] < np.arange(tokens - window + 1, tokens + 1)[:, None]
    for each, shares in ((True, groups.mean(axis=2)), (False, probabilities.mean(axis=1)[:, None])):
        low = (shares < 1 / seen.sum(axis=1)[:, None, None]) & seen[:, None]
        counts = low_counts(query, key, context, at_once, each=each)
        # A share in between of the two arithmetics may fall to either side.
        assert np.abs(counts.numpy() - low.sum(axis=0)[:, :context]).max(initial=0) <= 1


@given(
    seeds,
    heads,
    st.integers(1, 16),
    st.integers(0, 16),
    st.floats(0.5, 3),
    st.integers(1, 6),
    st.sampled_from((1.0, 0.7)),
)
def test_scores_are_the_weighted_attention_of_the_window(
    seed: int, heads: tuple[int, int], window: int, context: int, weight: float, rows: int, decay: float
) -> None:
    check_scores(seed, heads, context + window, window, weight, rows, decay)


@pytest.mark.parametrize("window", [128, 129, 260])
def test_long_windows_are_scored_in_slices(window: int) -> None:
    check_scores(3, (2, 1), window + 5, window, 1.2, 128, 1.0)
