"""What is LLaMA in all but name: one table of what differs. Pure."""

from dataclasses import dataclass
from typing import Any

from pyramidserve.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Family:
    """What ``transformers``' code of a model does otherwise than its LLaMA.

    Attributes:
        qkv_bias, output_bias, mlp_bias: whether projections have biases; None: the configuration says so.
        head_norms: queries and keys are normed, head by head, before they are rotated.
        fused: q, k and v are one tensor of the checkpoint, gate and up another.
        window: who attends to the newest ``sliding_window`` tokens alone: "all" layers, those of which
            "layer_types" says so, or, "", none.
        some_rotate: ``no_rope_layers`` says which layers rotate queries and keys by position.
        partial: ``partial_rotary_factor`` of each head is rotated; others rotate all of it.
        interleaved: llama.cpp rotates neighbouring rows, so that GGUF files have them in that order.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    head_norms: bool = False
    fused: bool = False
    window: str = ""
    some_rotate: bool = False
    partial: bool = False
    interleaved: bool = False


# By the ``model_type`` of config.json, which is the ``general.architecture`` of a GGUF file, too.
FAMILIES = {
    "llama": Family(interleaved=True),  # Yi too
    "mistral": Family(qkv_bias=False, output_bias=False, mlp_bias=False, window="all"),
    "qwen2": Family(qkv_bias=True, output_bias=False, mlp_bias=False, window="layer_types"),
    "qwen3": Family(mlp_bias=False, head_norms=True, window="layer_types"),
    "smollm3": Family(window="layer_types", some_rotate=True, interleaved=True),
    "phi3": Family(
        qkv_bias=False, output_bias=False, mlp_bias=False, fused=True, window="all", partial=True
    ),
}


def family_of(model_type: str, where: object) -> Family:
    """The family of a ``model_type``. Raises CheckpointError, naming it and ``where`` it was read."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise CheckpointError(
            f"the checkpoint at {where} is a {model_type!r} model, which is not served; "
            f"those that are LLaMA but for a few things are: {', '.join(FAMILIES)}"
        )
    return family


def windows(family: Family, config: Any, where: object) -> tuple[int, ...]:
    """Per layer, the newest tokens that one attends to, itself among them; 0: all. Empty: all in all.

    ``config`` is transformers'. Raises CheckpointError.
    """
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if not family.window:
        return ()
    types = getattr(config, "layer_types", None)
    if family.window == "all" and types is None:
        types = [FULL if window is None else SLIDING] * layers
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {SLIDING, FULL}:
        raise CheckpointError(
            f"layer_types of {where} is {types!r}; it must say {FULL!r} or {SLIDING!r} of each of "
            f"{layers} layers"
        )
    if SLIDING not in types:
        return ()
    if type(window) is not int or window < 1:
        raise CheckpointError(f"sliding_window of {where} is {window!r}; it must be a whole number above 0")
    return tuple(window if each == SLIDING else 0 for each in types)


def unrotated(family: Family, config: Any, where: object) -> tuple[int, ...]:
    """The layers that do not rotate queries and keys. Raises CheckpointError."""
    if not family.some_rotate:
        return ()
    layers, told = config.num_hidden_layers, config.no_rope_layers
    if not isinstance(told, list) or len(told) < layers or not {*told} <= {0, 1}:
        raise CheckpointError(
            f"no_rope_layers of {where} is {told!r}; it must be 1, or 0 for one that does not rotate, for "
            f"each of {layers} layers"
        )
    return tuple(layer for layer in range(layers) if not told[layer])


def bias(told: bool | None, config: Any, key: str) -> bool:
    """Whether projections have biases, as a family or else the configuration's ``key`` says."""
    return bool(getattr(config, key, False)) if told is None else told
