"""How a checkpoint scales its positions: what its configuration says of that, checked. Pure."""

import math
from typing import Any

from pyramidserve.errors import CheckpointError
from workers.model.families import Family

# How positions may be scaled → the numbers that that needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
# Of these, whose frequencies depend on the length of the sequence.
LENGTH_MATTERS = ("dynamic", "longrope")
# Settings of positions that are numbers above 0, where they are there.
ROPE_NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"),
)


def check_rope(checkpoint: object, parameters: Any) -> None:
    """Raises CheckpointError unless ``rope_parameters`` of ``transformers`` are such as are served."""
    kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} has rope_type {kind!r}; supported are {', '.join(ROPE_TYPES)}"
        )
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} scales positions of some layers alone ({', '.join(nested)}), "
            "which is not served"
        )
    for name in ROPE_NUMBERS:
        value = parameters.get(name)
        if value is None and name in ("rope_theta", *ROPE_TYPES[kind]):
            raise CheckpointError(f"rope_type {kind!r} of {checkpoint} needs {name}, which is not there")
        if value is not None and not _is_number(value):
            raise CheckpointError(f"{name} of {checkpoint} is {value!r}; it must be a number above 0")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def rope_parameters(config: Any) -> dict[str, Any]:
    """The RoPE settings of a ``transformers`` configuration; always has ``rope_type``."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters


def rotated_size(checkpoint: object, family: Family, rope: dict[str, Any], head_size: int) -> int:
    """How many values of a head are rotated. Raises CheckpointError."""
    factor = rope.get("partial_rotary_factor") or 1.0
    # Pairs, of which transformers rounds the number up.
    rotated = 2 * -(-int(head_size * factor) // 2)
    if not 0 < rotated <= head_size or (rotated < head_size and not family.partial):
        raise CheckpointError(
            f"partial_rotary_factor of {checkpoint} is {factor}, so that {rotated} of {head_size} values "
            "of a head are rotated, which is not served"
        )
    for name in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        factors = rope.get(name)
        if not isinstance(factors, list) or not all(map(_is_number, factors)):
            raise CheckpointError(f"{name} of {checkpoint} is {factors!r}; it must be numbers above 0")
        if len(factors) != rotated // 2:
            raise CheckpointError(
                f"{name} of {checkpoint} has {len(factors)} numbers; of {rotated} values that are rotated "
                f"it must be {rotated // 2}"
            )
    return rotated


def short_context(rope: dict[str, Any], trained: int) -> int:
    """Tokens up to which frequencies do not depend on a sequence's length; ``trained``: its positions."""
    if rope["rope_type"] == "longrope":
        return int(rope["original_max_position_embeddings"])
    return trained if rope["rope_type"] == "dynamic" else 0


def scaled_context(rope: dict[str, Any], trained: int) -> int:
    """The tokens that positions are scaled to reach, as vLLM derives them."""
    if rope["rope_type"] == "yarn":
        trained = rope.get("original_max_position_embeddings") or trained
    return int(trained * rope["factor"]) if rope["rope_type"] in ("linear", "dynamic", "yarn") else trained
