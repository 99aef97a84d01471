"""Models of any shape with random weights: to measure, to plan and to test with; they say nothing.

A weight is a function of the seed, its tensor's name and its place in it, by integers alone: the same on
every device and however layers are split. Only a configuration and a tokenizer are written.
"""

import hashlib
import re
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from pyramidserve.errors import CheckpointError
from workers.model.config import RANDOM_SEED, ModelConfig
from workers.model.folder import made_whole
from workers.model.shapes import SHAPES

PREFIX = "random:"
# A uniform weight has this standard deviation over the root of the inputs that it is summed over: what
# transformers' 0.02 is for Llama 2 13B.
GAIN = 1.43
# Elements filled at once, in 8 bytes each.
CHUNK = 1 << 24
# A permutation of 32 bits: the multipliers and shifts of github.com/skeeto/hash-prospector.
_ROUNDS, _LAST_SHIFT = ((16, 0x21F0AAAD), (15, 0x735A2D97)), 15
_MASK = (1 << 32) - 1


def random_checkpoint(name: str, cache: Path) -> Path:
    """The folder, in ``cache``, of ``random:SHAPE`` or ``random:SHAPE?seed=N``; it has no weights.

    SHAPE is one of SHAPES, or a folder with config.json. Raises CheckpointError.
    """
    matched = re.fullmatch(r"random:(.+?)(?:\?seed=(\d+))?", name)
    if not matched:
        raise CheckpointError(f"no checkpoint {name!r}: give random:SHAPE or random:SHAPE?seed=N")
    shape, seed = matched[1], int(matched[2] or 0)
    config = _config(shape)
    setattr(config, RANDOM_SEED, seed)
    from workers.model.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    content = config.to_json_string() + tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = cache / "random" / f"{Path(shape).name}-{digest}"
    if not folder.is_dir():
        with made_whole(folder) as made:
            config.save_pretrained(made)
            tokenizer.save_pretrained(made)
    return folder


def _config(shape: str) -> Any:
    """The ``transformers`` configuration of a shape."""
    from transformers import AutoConfig, LlamaConfig

    if shape in SHAPES:
        return LlamaConfig(**_settings(SHAPES[shape]))
    if not (Path(shape) / "config.json").is_file():
        raise CheckpointError(
            f"no shape {shape!r} for random weights: it is neither one of {', '.join(SHAPES)} nor a folder "
            "with config.json"
        )
    try:
        return AutoConfig.from_pretrained(shape)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{Path(shape) / 'config.json'} cannot be read: {error}") from error


def _settings(model: ModelConfig) -> dict[str, Any]:
    (eos,) = model.eos_ids
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.intermediate,
        "vocab_size": model.vocabulary,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": model.context,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "dtype": model.dtype,
    }


def fill(value: torch.Tensor, name: str, seed: int) -> None:
    """Overwrites ``value``, which is contiguous, with the weights of the tensor ``name``; norms are 1."""
    if name.endswith("norm.weight"):
        value.fill_(1)
        return
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
    bound = GAIN * sqrt(3 / value.shape[-1])
    flat = value.view(-1)
    for start in range(0, len(flat), CHUNK):
        end = min(start + CHUNK, len(flat))
        bits = torch.arange(start, end, dtype=torch.int64, device=value.device)
        bits = _mixed(_mixed(bits).bitwise_xor_(key)) >> 8
        # 24 bits, which fp32 holds exactly.
        flat[start:end] = bits.float().mul_(2 * bound / (1 << 24)).sub_(bound)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    for shift, factor in _ROUNDS:
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(_MASK)
    return bits.bitwise_xor_(bits >> _LAST_SHIFT)
