"""A model of the LLaMA family in llama.cpp's GGUF, made a folder of config.json and safetensors.

Every tensor of the file is used, or it is refused by name; none is made up. The names are llama.cpp's
(``gguf/constants.py``), the order of rotated rows is undone (``convert_hf_to_gguf.py``: ``permute``).
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from pyramidserve.errors import CheckpointError
from workers.model.families import Family, family_of
from workers.model.files import INDEX, WHOLE, listed

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

# llama.cpp's name of a module → transformers'; of layers, behind ``blk.N.``.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Where q, k and v are one, and gate and up.
OF_FUSED_LAYER = OF_LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
EMBEDDING, ROPE_FACTORS = "token_embd.weight", "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ORIGINAL = "rope.scaling.original_context_length"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Bytes after which a file is written: what a conversion holds in memory at most, and a tensor.
PART_BYTES = 1 << 27


class GGUFCheckpoint:
    """One GGUF file, or all parts of one that is split, open for reading."""

    def __init__(self, path: Path) -> None:
        """Reads the headers; ``path``: the file, or any of its parts. Raises CheckpointError."""
        from gguf import GGUFReader

        class BoundedReader(GGUFReader):
            """Does not read on behind the end of the file, where a damaged count may lead it."""

            def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
                found = super()._get(offset, dtype, count, override_order)
                if len(found) < count:
                    raise ValueError(f"it ends before {count} values at byte {offset}")
                return found

        self.path = path
        self.parts = parts_of(path)
        readers: list[GGUFReader] = []
        for part in self.parts:
            try:
                readers.append(BoundedReader(part))
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                raise CheckpointError(f"{part} cannot be read as GGUF: {error}") from error
        self._fields = readers[0].fields
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        told = self._value("split.count", 1)
        if told != len(self.parts):
            raise CheckpointError(
                f"{path} is one of {told} parts, but its name is not that of a part, so the others are not "
                "found; keep the names that they were published with: NAME-00001-of-0000N.gguf"
            )
        self.architecture = self._value("general.architecture", None)
        self.family = family_of(self.architecture, path)

    def settings(self) -> dict[str, Any]:
        """What ``transformers``' configuration is to be made with. Raises CheckpointError."""
        heads, hidden = self._needed("attention.head_count"), self._needed("embedding_length")
        if EMBEDDING not in self._tensors:
            raise CheckpointError(f"{self.path} lacks {EMBEDDING}; is it whole?")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self._of("rope.freq_base", 10000.0)}
        head_size = self._of("attention.key_length", hidden // heads)
        rotated = self._of("rope.dimension_count", head_size)
        if rotated != head_size:
            rope["partial_rotary_factor"] = rotated / head_size
        return {
            "model_type": self.architecture,
            "num_hidden_layers": self._needed("block_count"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": self._of("attention.head_count_kv", heads),
            "head_dim": head_size,
            "intermediate_size": self._needed("feed_forward_length"),
            "vocab_size": int(self._tensors[EMBEDDING].shape[1]),
            "rms_norm_eps": self._needed("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._needed("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
            "rope_parameters": rope | self._scaling(),
            "original_max_position_embeddings": self._of(ORIGINAL, self._needed("context_length")),
            "sliding_window": self._of("attention.sliding_window", None) or None,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id", None),
        }

    def dtype(self) -> str:
        """What keeps the file's precision: its own type, or bfloat16 for what is quantised."""
        types = {each.tensor_type.name for each in self._tensors.values() if len(each.shape) == 2}
        return "float32" if types == {"F32"} else "float16" if types == {"F16"} else "bfloat16"

    def end_ids(self) -> list[int]:
        """What ends a reply: a text, a turn, or a message."""
        told = (self._value(f"tokenizer.ggml.{end}_token_id", None) for end in ("eos", "eot", "eom"))
        return list(dict.fromkeys(int(each) for each in told if each is not None))

    def write_tensors(self, folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
        """Writes all tensors as ``dtype``, in files of about ``PART_BYTES``. Raises CheckpointError."""
        batch: dict[str, torch.Tensor] = {}
        written: dict[str, str] = {}
        size = total = 0

        def flush() -> None:
            nonlocal size
            part = f"model-{len(set(written.values())) + 1:05}.safetensors"
            save_file(batch, folder / part, metadata={"format": "pt"})
            written.update(dict.fromkeys(batch, part))
            batch.clear()
            size = 0

        for tensor in self._tensors.values():
            if tensor.name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
                continue
            value = _floats(tensor, settings, self.family, self.path).to(dtype)
            batch[_name(tensor.name, self.family, self.path)] = value
            size, total = size + value.nbytes, total + value.nbytes
            if size >= PART_BYTES:
                flush()
        if not written:
            save_file(batch, folder / WHOLE, metadata={"format": "pt"})
            return
        if batch:
            flush()
        index = {"metadata": {"total_size": total}, "weight_map": written}
        (folder / INDEX).write_text(json.dumps(index, indent=2))

    def _scaling(self) -> dict[str, Any]:
        """How frequencies are scaled, as ``rope_parameters`` of transformers."""
        if LONG_FACTORS in self._tensors and SHORT_FACTORS in self._tensors:
            return {
                "rope_type": "longrope",
                "short_factor": self._factors(SHORT_FACTORS),
                "long_factor": self._factors(LONG_FACTORS),
                "original_max_position_embeddings": self._needed(ORIGINAL),
                "attention_factor": self._of("rope.scaling.attn_factor", 1.0),
            }
        if ROPE_FACTORS in self._tensors:
            # llama.cpp's form of Llama 3.1: each frequency over a factor of its own, at any length.
            factors = self._factors(ROPE_FACTORS)
            return {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": self._needed("context_length"),
                "attention_factor": 1.0,
                "factor": 1.0,
            }
        kind = self._of("rope.scaling.type", "none")
        # Files of before scaling had a type, by ``rope.scale_linear``.
        factor = self._of("rope.scale_linear" if kind == "none" else "rope.scaling.factor", 1.0)
        if kind in ("none", "linear"):
            return {} if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self._needed(ORIGINAL)
            told = {
                "attention_factor": self._of("rope.scaling.attn_factor", None),
                "beta_fast": self._of("rope.scaling.yarn_beta_fast", None),
                "beta_slow": self._of("rope.scaling.yarn_beta_slow", None),
            }
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                **{key: value for key, value in told.items() if value is not None},
            }
        raise CheckpointError(
            f"{self.path} scales its positions by {kind!r}; none, linear and yarn are known"
        )

    def _factors(self, name: str) -> list[float]:
        factors: list[float] = self._tensors[name].data.astype(float).tolist()
        return factors

    def _of(self, key: str, default: Any) -> Any:
        return self._value(f"{self.architecture}.{key}", default)

    def _needed(self, key: str) -> Any:
        value = self._of(key, None)
        if value is None:
            raise CheckpointError(f"{self.path} does not say its {self.architecture}.{key}; is it whole?")
        return value

    def _value(self, key: str, default: Any) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()


def parts_of(path: Path) -> list[Path]:
    """All parts of a GGUF file, in order. Raises CheckpointError naming those that are not there."""
    matched = SPLIT.fullmatch(path.name)
    if not matched:
        return [path]
    stem, _, count = matched.groups()
    parts = [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise CheckpointError(
            f"{path} is split, and of its parts {listed(missing)} are not in {path.parent}"
        )
    return parts


def _name(name: str, family: Family, path: Path) -> str:
    """transformers' name of a tensor."""
    module, _, kind = name.rpartition(".")
    outer = OUTER.get(module)
    if outer:
        return f"{outer}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    modules = OF_FUSED_LAYER if family.fused else OF_LAYER
    if layer and layer[2] in modules and kind in ("weight", "bias"):
        return f"model.layers.{layer[1]}.{modules[layer[2]]}.{kind}"
    raise CheckpointError(f"{path} has a tensor {name!r}, which such a model does not have")


def _floats(tensor: "ReaderTensor", settings: dict[str, Any], family: Family, path: Path) -> torch.Tensor:
    """A tensor's values, fp32, rows in transformers' order."""
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{tensor.name!r} of {path} cannot be dequantised: {error}") from error
    values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    rotated = heads.get(tensor.name.split(".")[-2])
    if rotated and family.interleaved:
        # llama.cpp rotates neighbouring rows, transformers those that are half a head apart.
        pairs = values.reshape(settings[rotated], -1, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
