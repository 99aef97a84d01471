"""What a LLaMA-family checkpoint says of itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramidserve.errors import CheckpointError

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The setting of config.json that says that weights are random; see ``random_model``.
RANDOM_SEED = "pyramidserve_random_seed"
GENERATION = "generation_config.json"
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


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
    return ModelConfig(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        tied_embeddings=config.tie_word_embeddings,
        context=_context(config),
        eos_ids=_end_ids(checkpoint, config),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        random_seed=getattr(config, RANDOM_SEED, None),
    )


def _context(config: Any) -> int:
    """The tokens that positions are scaled to reach, as vLLM derives them."""
    rope = rope_parameters(config)
    trained = config.max_position_embeddings
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
    except (OSError, ValueError, KeyError) as error:
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
    parameters = rope_parameters(config)
    rope = parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} has rope_type {rope!r}; supported are {', '.join(ROPE_TYPES)}"
        )
    if rope == "longrope" and parameters["short_factor"] != parameters["long_factor"]:
        raise CheckpointError(
            f"the checkpoint at {checkpoint} turns positions otherwise beyond a length (rope_type "
            "'longrope' with two kinds of factors), which keys that are cached cannot follow"
        )
    return config


def rope_parameters(config: Any) -> dict[str, Any]:
    """The RoPE settings of a ``transformers`` configuration; always has ``rope_type``."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters
