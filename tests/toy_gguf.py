"""Toys as llama.cpp's GGUF, by its own writer."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import PreTrainedModel

from workers.model.byte_tokenizer import SPECIAL
from workers.model.families import FAMILIES
from workers.model.gguf_file import OF_FUSED_LAYER, OF_LAYER, OUTER

# Of the embedded model's kind, but of single bytes and one pair.
MERGED = "ab"
Model = TypeVar("Model", bound=PreTrainedModel)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    lacks: Collection[str] = (),
    extra: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    quantised: GGMLQuantizationType | None = None,
    tensors_a_part: int = 0,
) -> Path:
    """Writes ``model`` to ``path``; if split, to ``NAME-0000N-of-0000M.gguf``, and returns the first part.

    Args:
        lacks: tensors that are left out; ``extra``: arrays that are added.
        metadata: added; a value of None takes an entry away.
        quantised: what all but norms are quantised to; None: fp32.
    """
    writer = GGUFWriter(
        path if not tensors_a_part else path.with_name(f"{path.stem}.gguf"),
        model.config.model_type,
        split_max_tensors=tensors_a_part,
    )
    for key, value in (_metadata(model) | dict(metadata or {})).items():
        if value is not None:
            _add(writer, key, value)
    for name, array in (_tensors(model) | dict(extra or {})).items():
        if name in lacks:
            continue
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(name, quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not tensors_a_part:
        return path
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _metadata(model: PreTrainedModel) -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    config, rope = model.config, model.config.rope_parameters
    assert rope is not None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_size,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(str(rope["rope_theta"])),
        "llama.rope.dimension_count": int(head_size * (rope.get("partial_rotary_factor") or 1)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*SPECIAL, *alphabet, MERGED],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(alphabet) + 1),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {key.replace("llama.", f"{config.model_type}."): value for key, value in own.items()}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _tensors(model: PreTrainedModel) -> dict[str, Any]:
    family = FAMILIES[model.config.model_type]
    theirs = {ours: name for name, ours in (OUTER | (OF_FUSED_LAYER if family.fused else OF_LAYER)).items()}
    config, found = model.config, {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        module, _, kind = name.rpartition(".")
        if name.startswith("model.layers."):
            layer, own = module.removeprefix("model.layers.").split(".", 1)
            renamed = theirs[own]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if renamed in heads and family.interleaved:  # as convert_hf_to_gguf.py permutes
                halves = array.reshape(heads[renamed], 2, -1, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
            found[f"blk.{layer}.{renamed}.{kind}"] = array
        else:
            found[f"{theirs[module]}.{kind}"] = array
    return found


def with_bytes_and_pair(model: Model) -> Model:
    """``model`` with a row for the pair in its vocabulary."""
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    return model
