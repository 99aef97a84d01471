"""What a LLaMA-family checkpoint says of itself."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramidserve.errors import CheckpointError

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The setting of config.json that says that weights are random; see ``random_model``.
RANDOM_SEED = "pyramidserve_random_seed"
GENERATION = "generation_config.json"
# How positions may be scaled → the numbers that that needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (),
}


# A size of a model → what config.json calls it.
SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
}
# Settings of positions that are numbers above 0, where they are there.
ROPE_NUMBERS = (
    *("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"),
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a LLaMA.

    Attributes:
        context: the most tokens, prompt and output, of one sequence.
        random_seed: of weights that are not read but made; None: they are the checkpoint's.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    norm_epsilon: float
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    context: int
    eos_ids: tuple[int, ...]
    dtype: str
    random_seed: int | None = None


def read_config(checkpoint: Path) -> ModelConfig:
    """Reads ``config.json`` of a checkpoint folder. Raises CheckpointError."""
    config = transformers_config(checkpoint)
    sizes = {name: _size(checkpoint, config, key) for name, key in SIZES.items()}
    if sizes["heads"] % sizes["kv_heads"]:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} has {sizes['heads']} heads, which cannot share "
            f"{sizes['kv_heads']} KV heads evenly"
        )
    epsilon = config.rms_norm_eps
    if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"rms_norm_eps of {checkpoint} is {epsilon!r}; it must be in [0, 1)")
    return ModelConfig(
        **sizes,
        norm_epsilon=epsilon,
        attention_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
        tied_embeddings=bool(config.tie_word_embeddings),
        context=_context(checkpoint, config),
        eos_ids=_end_ids(checkpoint, config),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        random_seed=getattr(config, RANDOM_SEED, None),
    )


def _size(checkpoint: Path, config: Any, key: str) -> int:
    value = getattr(config, key, None)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key} of {checkpoint} is {value!r}; it must be a whole number above 0")
    return value


def _context(checkpoint: Path, config: Any) -> int:
    """The tokens that positions are scaled to reach, as vLLM derives them."""
    rope, trained = rope_parameters(config), _size(checkpoint, config, "max_position_embeddings")
    if rope["rope_type"] == "yarn":
        trained = rope.get("original_max_position_embeddings") or trained
    return int(trained * rope["factor"]) if rope["rope_type"] in ("linear", "dynamic", "yarn") else trained


def _end_ids(checkpoint: Path, config: Any) -> tuple[int, ...]:
    """What ends a reply, by ``config.json`` and ``generation_config.json``, where chat models name more."""
    generation = checkpoint / GENERATION
    try:
        also = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        both = [ids if isinstance(ids, list) else [ids] for ids in (config.eos_token_id, also)]
        return tuple(dict.fromkeys(int(each) for ids in both for each in ids if each is not None))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{generation} cannot be read: {error}") from error


def transformers_config(checkpoint: Path) -> Any:
    """The checkpoint's ``transformers`` configuration, checked to be a LLaMA that we can run."""
    from transformers import AutoConfig

    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"no checkpoint at {checkpoint}: config.json is missing; give a folder with config.json "
            "and *.safetensors, or a .gguf file"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # transformers computes with what it reads before it checks it
        raise CheckpointError(f"{checkpoint / 'config.json'} cannot be read: {error}") from error
    if config.model_type != "llama":
        raise CheckpointError(
            f"the checkpoint at {checkpoint} is a {config.model_type!r} model; "
            "only the LLaMA architecture (model_type 'llama') is supported"
        )
    if config.hidden_act != "silu":
        raise CheckpointError(
            f"the checkpoint at {checkpoint} has activation {config.hidden_act!r}; LLaMA has 'silu'"
        )
    _check_rope(checkpoint, rope_parameters(config))
    return config


def _check_rope(checkpoint: Path, parameters: Any) -> None:
    kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} has rope_type {kind!r}; supported are {', '.join(ROPE_TYPES)}"
        )
    for name in ROPE_NUMBERS:
        value = parameters.get(name)
        if value is None and name in ("rope_theta", *ROPE_TYPES[kind]):
            raise CheckpointError(f"rope_type {kind!r} of {checkpoint} needs {name}, which is not there")
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise CheckpointError(f"{name} of {checkpoint} is {value!r}; it must be a number above 0")
    if kind == "longrope" and parameters["short_factor"] != parameters["long_factor"]:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} turns positions otherwise beyond a length (rope_type "
            "'longrope' with two kinds of factors), which keys that are cached cannot follow"
        )


def rope_parameters(config: Any) -> dict[str, Any]:
    """The RoPE settings of a ``transformers`` configuration; always has ``rope_type``."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters
