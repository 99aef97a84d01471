"""Loads one shard's weights from a checkpoint, and nothing else."""

import json
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import nn

from pyramidserve.errors import CheckpointError
from workers.kernels.interface import Kernels
from workers.model.config import ModelConfig
from workers.model.llama import LlamaStage

# Our parameter → the checkpoint's, concatenated along the output dimension.
LAYER_TENSORS = {
    "input_norm.weight": ("input_layernorm.weight",),
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "output.weight": ("self_attn.o_proj.weight",),
    "output.bias": ("self_attn.o_proj.bias",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate_up.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down.weight": ("mlp.down_proj.weight",),
    "down.bias": ("mlp.down_proj.bias",),
}


class CheckpointFiles:
    """The safetensors files of a checkpoint folder, read a tensor at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self._files: dict[str, Path] = {}
        index = checkpoint / "model.safetensors.index.json"
        try:
            if index.is_file():
                weight_map = json.loads(index.read_text())["weight_map"]
                parts = {checkpoint / file for file in weight_map.values()}
            else:
                parts = {checkpoint / "model.safetensors"}
            for part in parts:
                with safe_open(part, "pt") as tensors:
                    self._files |= dict.fromkeys(tensors.keys(), part)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the weights of {checkpoint} cannot be read: {error}; "
                "model.safetensors (or its index and all its parts) must be there and whole"
            ) from error
        self.loaded: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor. Raises CheckpointError if it is not there or damaged."""
        if name not in self._files:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}; is it a LLaMA, whole?")
        try:
            with safe_open(self._files[name], "pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"tensor {name!r} cannot be read from {self._files[name]}: {error}"
            ) from error
        self.loaded.append(name)
        return tensor


def load_stage(
    checkpoint: Path,
    config: ModelConfig,
    first: int,
    end: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
) -> tuple[LlamaStage, tuple[str, ...]]:
    """Builds the shard with layers ``first`` to ``end`` and fills it.

    Returns the shard and the names of the checkpoint's tensors that it holds. Raises CheckpointError.
    """
    files = CheckpointFiles(checkpoint)
    with init_empty_weights():
        stage = LlamaStage(config, first, end, kernels)
    tied = config.tied_embeddings and stage.embedding is not None
    for name, parameter in list(stage.named_parameters()):
        if tied and name == "head.weight":
            continue
        tensors = [files.read(source) for source in _sources(name, first, config)]
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        if shape != parameter.shape:
            raise CheckpointError(
                f"{name} has shape {shape} in {checkpoint}, "
                f"but config.json asks for {tuple(parameter.shape)}"
            )
        # Copied, as what is read lies in the file, which may change while it is served.
        value = torch.empty(shape, dtype=dtype, device=device)
        for part, tensor in zip(torch.split(value, [*map(len, tensors)]), tensors, strict=True):
            part.copy_(tensor)
        set_module_tensor_to_device(stage, name, device, value=value, dtype=dtype)
    if tied and stage.head is not None:
        stage.head.weight = cast(nn.Embedding, stage.embedding).weight
    stage.fuse(config)
    return stage.requires_grad_(False).eval(), tuple(dict.fromkeys(files.loaded))


def _sources(name: str, first: int, config: ModelConfig) -> tuple[str, ...]:
    """Names of the checkpoint's tensors that make up our parameter ``name``."""
    if name == "embedding.weight":
        return ("model.embed_tokens.weight",)
    if name == "final_norm.weight":
        return ("model.norm.weight",)
    if name == "head.weight":
        return ("model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight",)
    _, index, parameter = name.split(".", 2)
    return tuple(f"model.layers.{first + int(index)}.{source}" for source in LAYER_TENSORS[parameter])
