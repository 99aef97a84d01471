"""PyramidInfer's schedule (arXiv 2405.12532): the deeper the layer, the fewer tokens it keeps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, PyramidParameters
from workers.budget.plan import GenerationPlan, KeepPlan

# Where the solver may go, in this order, to reach a kept fraction: the decay ratio first, as the paper
# does; then the shape, from the cosine to a straight line; then the recent window.
DECAY_RATIO_FLOOR = 0.5
RECENT_RATIOS = (0.2, 0.1, 0.05)
TOLERANCE = 0.005
# A straight pyramid keeps this many times its mean in its first layer, and as much less in its last.
SLOPE = 0.5
# A solved schedule may have a recent window of a few tokens; generation keeps at least this many.
LEAST_GENERATION_WINDOW = 32


def plan_pyramid(compression: Compression, prompt_tokens: int, layers: int) -> KeepPlan:
    """The counts for one prompt.

    With ``kv_keep`` the schedule's knobs are solved for; otherwise they are obeyed.
    """
    parameters = compression.pyramid or PyramidParameters()
    prune = compression.prefill == "prune"
    if compression.kv_keep is None:
        kept, bound_by = cosine_counts(parameters, prompt_tokens, layers), ""
        recent = window = recent_tokens(parameters, prompt_tokens)
    else:
        solved = solve(compression.kv_keep, prompt_tokens, layers, prune)
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
        distance_weight=parameters.distance_weight,
        drops_hidden_states=prune,
        generation=GenerationPlan(chunk=chunk, window=window, start=kept, keeps=keeps),
        bound_by=bound_by,
    )


def recent_tokens(parameters: PyramidParameters, prompt_tokens: int) -> int:
    """Tokens of the recent window, ``1 + int(recent_ratio * n)``."""
    return 1 + int(parameters.recent_ratio * prompt_tokens)


def cosine_ratios(floor: float, layers: int) -> list[float]:
    """Per layer, a ratio that falls from 1 to ``floor`` along half a cosine."""
    return [floor + (1 - floor) * (1 + math.cos(math.pi * layer / layers)) / 2 for layer in range(layers)]


def cosine_counts(parameters: PyramidParameters, prompt_tokens: int, layers: int) -> tuple[int, ...]:
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

    parameters: PyramidParameters
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

    paper = PyramidParameters()
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
    parameters: PyramidParameters, kv_keep: float, prompt_tokens: int, layers: int
) -> PyramidParameters:
    """Bisects the decay ratio, in which the kept fraction grows."""

    def at(ratio: float) -> PyramidParameters:
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
    parameters: PyramidParameters, kv_keep: float, prompt_tokens: int, layers: int, prune: bool
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


def validate_pyramid(compression: Compression) -> None:
    """Raises InvalidRequestError, naming the knob and its range."""
    if compression.prefill not in ("prune", "evict"):
        raise InvalidRequestError(f"prefill is {compression.prefill!r}; it must be 'prune' or 'evict'")
    if compression.pyramid is None:
        return
    parameters = compression.pyramid
    if parameters.prefill_decay_strategy != "cosine":
        raise InvalidRequestError(
            f"prefill_decay_strategy is {parameters.prefill_decay_strategy!r}; it must be 'cosine'"
        )
    ranges: list[tuple[str, float, bool, str]] = [
        (name, value, low < value <= high, f"({low}, {high:g}]")
        for name, value, low, high in (
            ("prefill_decay_ratio", parameters.prefill_decay_ratio, 0, 1),
            ("gen_compress_ratio", parameters.gen_compress_ratio, 0, 1),
            ("gen_decay_ratio", parameters.gen_decay_ratio, 0, 1),
            ("distance_weight", parameters.distance_weight, 0, 1e6),
        )
    ]
    ranges += [
        (name, value, value >= low, f"[{low}, ...)")
        for name, value, low in (
            ("min_context_length", parameters.min_context_length, 0),
            ("layerwise_downsample_interval", parameters.layerwise_downsample_interval, 1),
            ("streamingllm_sink_len", parameters.streamingllm_sink_len, 0),
            ("exceed_length_to_compress", parameters.exceed_length_to_compress, 1),
        )
    ]
    ratio = parameters.recent_ratio
    ranges.append(("recent_ratio", ratio, 0 <= ratio < 1, "[0, 1)"))
    for name, value, inside, text in ranges:
        if not inside:
            raise InvalidRequestError(f"{name} is {value}; it must be in {text}")
