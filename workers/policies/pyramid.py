"""PyramidInfer's schedule (arXiv 2405.12532): the deeper the layer, the fewer tokens it keeps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from workers.budget.observation import RowAttention
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.policies.budget import SLOPE
from workers.policies.capacity import asked_counts, sets
from workers.policies.observed import best_by_attention
from workers.policies.policy import Policy, Target, heads_knob, knob

# Where the solver may go, in this order, to reach a kept fraction: the decay ratio first, as the paper
# does; then the shape, from the cosine to a straight line; then the recent window.
DECAY_RATIO_FLOOR = 0.5
RECENT_RATIOS = (0.2, 0.1, 0.05)
TOLERANCE = 0.005
# A solved schedule may have a recent window of a few tokens; generation keeps at least this many.
LEAST_GENERATION_WINDOW = 32


@dataclass(frozen=True)
class PyramidKnobs:
    """The knobs of the released code by their names, at its values for 7B."""

    recent_ratio: float = knob(
        0.2, "[0, 1)", "share of the prompt that is the recent window and never dropped", counts=True
    )
    prefill_decay_ratio: float = knob(
        0.9, "(0, 1]", "keep ratio that the deepest layer reaches", counts=True
    )
    prefill_decay_strategy: str = knob("cosine", "cosine", "how the ratio falls with depth", counts=True)
    min_context_length: int = knob(
        64, "[0, ...)", "a layer's context is not cut to fewer tokens", counts=True
    )
    layerwise_downsample_interval: int = knob(
        1, "[1, ...)", "every so many layers the context is cut", counts=True
    )
    streamingllm_sink_len: int = knob(4, "[0, ...)", "first tokens that are always kept", counts=True)
    distance_weight: float = knob(
        1.2, "(0, 1e6]", "weight of the newest row of the recent window; the oldest weighs 1", counts=True
    )
    exceed_length_to_compress: int = knob(
        16,
        "[1, ...)",
        "generated tokens compressed as one chunk once they have left the recent window",
        counts=True,
    )
    gen_compress_ratio: float = knob(0.9, "(0, 1]", "share of such a chunk that layer 0 keeps", counts=True)
    gen_decay_ratio: float = knob(
        0.1, "(0, 1]", "what that share is multiplied with in the deepest layer", counts=True
    )
    heads: str = heads_knob("all")


def plan_pyramid(target: Target, knobs: PyramidKnobs) -> KeepPlan:
    """The counts for one prompt.

    With ``kv_keep`` the schedule's knobs are solved for; otherwise they are obeyed. Counts that are asked
    for take the place of the schedule: with "prune" layer 0 has all tokens even so.
    """
    parameters, prompt_tokens, layers = knobs, target.prompt_tokens, target.layers
    if target.tokens is not None or target.weights is not None:
        kept, bound_by = asked_counts(target), ""
        recent = min(recent_tokens(parameters, prompt_tokens), *kept)
        window = max(recent, LEAST_GENERATION_WINDOW)
    elif target.kv_keep is None:
        kept, bound_by = cosine_counts(parameters, prompt_tokens, layers), ""
        recent = window = recent_tokens(parameters, prompt_tokens)
    else:
        solved = solve(target.kv_keep, prompt_tokens, layers, target.prunes)
        parameters, kept, bound_by = solved.parameters, solved.kept, solved.bound_by
        recent = recent_tokens(parameters, prompt_tokens)
        window = max(recent, LEAST_GENERATION_WINDOW)
    chunk = parameters.exceed_length_to_compress
    keeps = tuple(
        max(int(chunk * parameters.gen_compress_ratio * ratio), 1)
        for ratio in cosine_ratios(parameters.gen_decay_ratio, layers)
    )
    return KeepPlan(
        prompt_tokens=prompt_tokens,
        kept=kept,
        recent=recent,
        sinks=min(parameters.streamingllm_sink_len, prompt_tokens - recent),
        observes=RowAttention(rows=recent, newest=parameters.distance_weight),
        heads=sets(knobs.heads),
        drops_hidden_states=target.prunes,
        generation=GenerationPlan(
            chunk=chunk,
            window=window,
            start=kept,
            keeps=keeps,
            observes=RowAttention(rows=window, newest=parameters.distance_weight),
        ),
        bound_by=bound_by,
    )


def recent_tokens(parameters: PyramidKnobs, prompt_tokens: int) -> int:
    """Tokens of the recent window, ``1 + int(recent_ratio * n)``."""
    return 1 + int(parameters.recent_ratio * prompt_tokens)


def cosine_ratios(floor: float, layers: int) -> list[float]:
    """Per layer, a ratio that falls from 1 to ``floor`` along half a cosine."""
    return [floor + (1 - floor) * (1 + math.cos(math.pi * layer / layers)) / 2 for layer in range(layers)]


def cosine_counts(parameters: PyramidKnobs, prompt_tokens: int, layers: int) -> tuple[int, ...]:
    """Tokens that each layer keeps, as the released code counts them."""
    recent = recent_tokens(parameters, prompt_tokens)
    minimum = min(parameters.min_context_length, prompt_tokens - recent)
    context = prompt_tokens - recent
    counts = []
    for layer, ratio in enumerate(cosine_ratios(parameters.prefill_decay_ratio, layers)):
        counts.append(recent + context)
        smaller = int(context * ratio)
        if layer % parameters.layerwise_downsample_interval == 0 and smaller > minimum:
            context = smaller
    return tuple(counts)


@dataclass(frozen=True)
class Solution:
    """A schedule that comes closest to a kept fraction."""

    parameters: PyramidKnobs
    kept: tuple[int, ...]
    bound_by: str


def solve(kv_keep: float, prompt_tokens: int, layers: int, prune: bool) -> Solution:
    """Finds a schedule that keeps the fraction ``kv_keep`` of the prompt's KV.

    Moves, in order: the decay ratio down to 0.5; the shape, from the cosine to a straight line from 1.5
    to 0.5 times the mean (in ``prune`` layer 0 sees all tokens); the recent ratio from 0.2 to 0.1 and
    0.05. The minimum context of 64 tokens stays, so a short prompt may keep more; ``bound_by`` says so.
    """

    def close(kept: tuple[int, ...]) -> bool:
        return abs(sum(kept) / (layers * prompt_tokens) - kv_keep) <= TOLERANCE

    paper = PyramidKnobs()
    parameters = _solve_decay_ratio(paper, kv_keep, prompt_tokens, layers)
    kept = cosine_counts(parameters, prompt_tokens, layers)
    if close(kept):
        return Solution(parameters, kept, "")
    for recent_ratio in RECENT_RATIOS:
        parameters = replace(paper, recent_ratio=recent_ratio)
        kept = straight_counts(parameters, kv_keep, prompt_tokens, layers, prune)
        if close(kept):
            return Solution(parameters, kept, "")
    return Solution(parameters, kept, "minimum context")


def _solve_decay_ratio(
    parameters: PyramidKnobs, kv_keep: float, prompt_tokens: int, layers: int
) -> PyramidKnobs:
    """Bisects the decay ratio, in which the kept fraction grows."""

    def at(ratio: float) -> PyramidKnobs:
        return replace(parameters, prefill_decay_ratio=ratio)

    def fraction(ratio: float) -> float:
        return sum(cosine_counts(at(ratio), prompt_tokens, layers)) / (layers * prompt_tokens)

    return at(_bisect(fraction, kv_keep, DECAY_RATIO_FLOOR, 1.0))


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The point of [low, high] where the growing ``function`` is closest to ``target``."""
    tried = {point: abs(function(point) - target) for point in (low, high)}
    for _ in range(16):
        middle = (low + high) / 2
        value = function(middle)
        tried[middle] = abs(value - target)
        low, high = (middle, high) if value < target else (low, middle)
    return min(tried, key=lambda point: tried[point])


def straight_counts(
    parameters: PyramidKnobs, kv_keep: float, prompt_tokens: int, layers: int, prune: bool
) -> tuple[int, ...]:
    """Tokens that each layer keeps of a prompt whose kept counts fall along a straight line.

    The slope gives way where it would cut a layer below the recent window and the minimum context.
    """
    recent = recent_tokens(parameters, prompt_tokens)
    least = recent + min(parameters.min_context_length, prompt_tokens - recent)
    whole = 1 if prune else 0
    rest = max(1, layers - whole)
    mean = max(least, (kv_keep * layers - whole) * prompt_tokens / rest)
    slope = min(SLOPE, 1 - least / mean, max(0.0, prompt_tokens / mean - 1)) if rest > 1 else 0.0
    line = [1 + slope * (1 - 2 * index / max(1, rest - 1)) for index in range(layers - whole)]
    return (prompt_tokens,) * whole + tuple(min(prompt_tokens, round(mean * factor)) for factor in line)


POLICY = Policy(
    "pyramid",
    "2",
    "fewer tokens the deeper the layer, those that the newest attend to (PyramidInfer, 2405.12532)",
    PyramidKnobs,
    plan_pyramid,
    best_by_attention,
    prefills=("prune", "evict"),
)
