"""What a LLaMA-family checkpoint says of itself."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyramidserve.errors import CheckpointError, ConfigurationError
from workers.model.families import bias, family_of, unrotated, windows
from workers.model.scaling import (
    LENGTH_MATTERS,
    check_rope,
    rope_parameters,
    rotated_size,
    scaled_context,
    short_context,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The setting of config.json that says that weights are random; see ``random_model``.
RANDOM_SEED = "pyramidserve_random_seed"
GENERATION = "generation_config.json"
# A size of a model → what config.json calls it.
SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a LLaMA, and what its family has that LLaMA has not; see ``Family``.

    Attributes:
        attention_bias: of queries, keys and values.
        context: the most tokens, prompt and output, of one sequence.
        random_seed: of weights that are not read but made; None: they are the checkpoint's.
        rotated: values of a head that are rotated, its first; 0: all.
        windows: per layer, the newest tokens that one attends to, itself among them; 0: all. Empty: all in
            all layers.
        unrotated: layers that rotate nothing.
        rope_type: how positions are scaled; see ROPE_TYPES.
        short_context: tokens up to which frequencies do not depend on a sequence's length.
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
    output_bias: bool = False
    head_norms: bool = False
    fused: bool = False
    rotated: int = 0
    windows: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()
    rope_type: str = "default"
    short_context: int = 0

    @property
    def summary(self) -> str:
        """What a message says of the model."""
        sizes = f"{self.layers} layers, a context of {self.context} tokens"
        return f"{sizes} and a vocabulary of {self.vocabulary}"

    @property
    def fingerprint(self) -> str:
        """What models whose budgets were measured are known by: their sizes, as fine-tuned ones have."""
        heads = f"{self.heads} heads, {self.kv_heads} KV heads of {self.head_size}"
        sizes = f"hidden {self.hidden}, MLP {self.intermediate}, vocabulary {self.vocabulary}"
        return f"{self.layers} layers, {heads}, {sizes}"

    def window(self, layer: int) -> int:
        """The newest tokens that one attends to in ``layer``, itself among them; 0: all."""
        return self.windows[layer] if self.windows else 0

    def frequencies_length(self, length: int) -> int:
        """The length that stands for a sequence's in what frequencies are computed from.

        Where they do not depend on it, or are the same for others, all that have the same frequencies
        have the same. None is longer in the cache than the context.
        """
        length = min(length, self.context)
        if self.rope_type not in LENGTH_MATTERS or length <= self.short_context:
            return self.short_context
        return length if self.rope_type == "dynamic" else self.short_context + 1


def read_config(checkpoint: Path, max_model_len: int = 0) -> ModelConfig:
    """Reads ``config.json`` of a checkpoint folder.

    Args:
        max_model_len: the context that is served, in tokens; 0: all that there is.

    Raises CheckpointError, or ConfigurationError where ``max_model_len`` is more than there is.
    """
    model = _read(checkpoint)
    if not 0 <= max_model_len <= model.context:
        raise ConfigurationError(
            f"max_model_len is {max_model_len}, but {checkpoint.name} has {model.summary}; give at most "
            f"{model.context}, or 0 for all of it"
        )
    return replace(model, context=max_model_len or model.context)


def _read(checkpoint: Path) -> ModelConfig:
    config = transformers_config(checkpoint)
    family, rope = family_of(config.model_type, checkpoint), rope_parameters(config)
    sizes = {name: _size(checkpoint, config, key) for name, key in SIZES.items()}
    head_size = sizes["hidden"] // sizes["heads"]
    if getattr(config, "head_dim", None) is not None:
        head_size = _size(checkpoint, config, "head_dim")
    if head_size % 2 or not head_size:
        raise CheckpointError(f"heads of {checkpoint} have {head_size} values; it must be an even number")
    rotated = rotated_size(checkpoint, family, rope, head_size)
    trained = _size(checkpoint, config, "max_position_embeddings")
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
        head_size=head_size,
        attention_bias=bias(family.qkv_bias, config, "attention_bias"),
        output_bias=bias(family.output_bias, config, "attention_bias"),
        mlp_bias=bias(family.mlp_bias, config, "mlp_bias"),
        tied_embeddings=bool(config.tie_word_embeddings),
        context=scaled_context(rope, trained),
        eos_ids=_end_ids(checkpoint, config),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        random_seed=getattr(config, RANDOM_SEED, None),
        head_norms=family.head_norms,
        fused=family.fused,
        rotated=rotated % head_size,
        windows=windows(family, config, checkpoint),
        unrotated=unrotated(family, config, checkpoint),
        rope_type=rope["rope_type"],
        short_context=short_context(rope, trained),
    )


def _size(checkpoint: Path, config: Any, key: str) -> int:
    value = getattr(config, key, None)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key} of {checkpoint} is {value!r}; it must be a whole number above 0")
    return value


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
    """The checkpoint's ``transformers`` configuration, checked to be one that we can run."""
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
    family_of(config.model_type, checkpoint)
    if config.hidden_act != "silu":
        raise CheckpointError(
            f"the checkpoint at {checkpoint} has activation {config.hidden_act!r}; 'silu' is served"
        )
    check_rope(checkpoint, rope_parameters(config))
    return config
