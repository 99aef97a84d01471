"""Draws tokens from logits. A draw is a function of (logits, seed, output index) alone."""

import math
from collections.abc import Sequence

import torch

from pyramidserve.types import Sampling
from workers.schedule.step import NO_TOKEN

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on (seed, index) alone: two rounds of splitmix64."""
    state = seed & _MASK
    for salt in (index, 0x9E3779B97F4A7C15):
        state = (state + (salt + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def sample(logits: torch.Tensor, samplings: Sequence[Sampling], output_indices: Sequence[int]) -> list[int]:
    """Draws one token a row; NO_TOKEN where the best logit is not finite, as nothing follows from such.

    Args:
        logits: fp32 [rows, vocabulary].
        samplings: how to draw; those with a temperature have a seed.
        output_indices: output index of each drawn token.
    """
    best = logits.max(dim=-1)  # NaN is above all
    # What is not finite is no number less itself: told in one copy, and in two launches.
    found: list[float] = (best.indices + (best.values - best.values)).tolist()
    tokens = [NO_TOKEN if math.isnan(token) else int(token) for token in found]
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0 and tokens[row] != NO_TOKEN:
            assert sampling.seed is not None
            point = uniform(sampling.seed, output_indices[row])
            tokens[row] = _draw(logits[row], sampling, point)
    return tokens


def _draw(logits: torch.Tensor, sampling: Sampling, point: float) -> int:
    """The token at ``point`` in [0, 1) of the distribution, most likely first."""
    # Shifted first: a tiny temperature must not overflow to infinities.
    scaled = (logits - logits.max()).double() / sampling.temperature
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_k is not None:
        count = min(sampling.top_k, len(probabilities))
        ordered, ids = torch.topk(probabilities, count)
    else:
        ordered, ids = probabilities.sort(descending=True, stable=True)
    ordered = ordered[: int((ordered > 0).sum())]  # what cannot be is not drawn
    if sampling.min_p > 0:
        ordered = ordered[: int((ordered >= sampling.min_p * ordered[0]).sum())]
    cumulative = ordered.cumsum(dim=-1)
    if sampling.top_p < 1:
        # The first token that reaches top_p is the last one in.
        within = int((cumulative < sampling.top_p * cumulative[-1]).sum()) + 1
        cumulative = cumulative[:within]
    target = point * cumulative[-1]
    drawn = int(torch.searchsorted(cumulative, target, right=True))
    return int(ids[min(drawn, len(cumulative) - 1)])
