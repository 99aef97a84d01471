"""Loads one shard's weights from a checkpoint, and nothing else."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from pyramidserve.errors import CheckpointError
from workers.events import tell
from workers.model.config import ModelConfig
from workers.model.files import CheckpointFiles
from workers.model.llama import LlamaStage
from workers.model.operations import Operations
from workers.model.random_model import fill

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
# Our parameter → the checkpoint's, concatenated along the output dimension.
LAYER_TENSORS = {
    "input_norm.weight": ("input_layernorm.weight",),
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "query_norm.weight": ("self_attn.q_norm.weight",),
    "key_norm.weight": ("self_attn.k_norm.weight",),
    "output.weight": ("self_attn.o_proj.weight",),
    "output.bias": ("self_attn.o_proj.bias",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate_up.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down.weight": ("mlp.down_proj.weight",),
    "down.bias": ("mlp.down_proj.bias",),
}
# Where a family's checkpoints have them as one.
FUSED_TENSORS = LAYER_TENSORS | {
    "qkv.weight": ("self_attn.qkv_proj.weight",),
    "gate_up.weight": ("mlp.gate_up_proj.weight",),
}


def open_weights(checkpoint: Path, config: ModelConfig) -> CheckpointFiles | None:
    """The files of a checkpoint, whose tensors are just those of the model; None where weights are random.

    Raises CheckpointError.
    """
    if config.random_seed is not None:
        return None
    files = CheckpointFiles(checkpoint)
    if config.layers > len(files):
        raise CheckpointError(
            f"{checkpoint} has {len(files)} tensors, too few for the {config.layers} layers that its "
            "config.json tells of"
        )
    there = {"qkv.bias": config.attention_bias, "output.bias": config.output_bias}
    there |= dict.fromkeys(("gate_up.bias", "down.bias"), config.mlp_bias)
    there |= dict.fromkeys(("query_norm.weight", "key_norm.weight"), config.head_norms)
    own = [
        f"layers.{layer}.{parameter}"
        for layer in range(config.layers)
        for parameter in LAYER_TENSORS
        if there.get(parameter, True)
    ]
    names = ("embedding.weight", *own, "final_norm.weight", "head.weight")
    files.check_names(
        [source for name in names for source in source_names(name, 0, config)], unused=(HEAD,)
    )
    return files


def load_stage(
    checkpoint: Path,
    config: ModelConfig,
    first: int,
    end: int,
    dtype: torch.dtype,
    device: torch.device,
    operations: Operations,
) -> tuple[LlamaStage, tuple[str, ...]]:
    """Builds the shard with layers ``first`` to ``end`` and fills it, with random weights if it is to.

    Returns the shard and the names of the checkpoint's tensors that it holds. Raises CheckpointError.
    """
    files = open_weights(checkpoint, config)
    with init_empty_weights():
        stage = LlamaStage(config, first, end, operations)
    tied = config.tied_embeddings and stage.embedding is not None
    held: list[str] = []
    for name, parameter in list(stage.named_parameters()):
        if tied and name == "head.weight":
            continue
        sources = source_names(name, first, config)
        held += sources
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if files is None:
            assert config.random_seed is not None
            fill(value, sources[0], config.random_seed)
        else:
            _copy(files, sources, value, name)
            if config.rotated:
                value.copy_(value[_rotated_rows(name, len(value), config)])
        set_module_tensor_to_device(stage, name, device, value=value, dtype=dtype)
    if tied and stage.head is not None:
        stage.head.weight = cast(nn.Embedding, stage.embedding).weight
    if files is None:
        seed = config.random_seed
        tell(logger, logging.WARNING, "weights_random", seed=seed, first_layer=first, end_layer=end)
    return stage.requires_grad_(False).eval(), tuple(dict.fromkeys(held))


def _copy(files: CheckpointFiles, sources: Sequence[str], value: torch.Tensor, name: str) -> None:
    """Fills the parameter ``name`` with what it is made up of; a copy, as files may change meanwhile."""
    tensors = [files.read(source) for source in sources]
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    if shape != value.shape:
        raise CheckpointError(
            f"{name} has shape {shape} in {files.checkpoint}, but config.json asks for {tuple(value.shape)}"
        )
    for part, tensor in zip(torch.split(value, [*map(len, tensors)]), tensors, strict=True):
        part.copy_(tensor)


def _rotated_rows(name: str, rows: int, config: ModelConfig) -> torch.Tensor:
    """The order of a parameter's rows in which each head's rotated values are the first of both halves.

    Queries and keys are rotated as halves. What is not rotated comes behind, in both alike, where it is
    turned by nothing; an order that queries and keys have in common changes no product of theirs.
    """
    order, size, turned = torch.arange(rows), config.head_size, config.rotated // 2
    heads = {
        "qkv.weight": config.heads + config.kv_heads,
        "qkv.bias": config.heads + config.kv_heads,
        "query_norm.weight": 1,
        "key_norm.weight": 1,
    }.get(name.partition(".")[2].partition(".")[2], 0)
    first, second, still = torch.split(torch.arange(size), [turned, turned, size - 2 * turned])
    each = torch.cat((first, still[: size // 2 - turned], second, still[size // 2 - turned :]))
    own = order[: heads * size].view(heads, size)[:, each].reshape(-1)
    return torch.cat((own, order[heads * size :]))


def source_names(name: str, first: int, config: ModelConfig) -> tuple[str, ...]:
    """Names of the checkpoint's tensors that make up our parameter ``name``."""
    if name == "embedding.weight":
        return ("model.embed_tokens.weight",)
    if name == "final_norm.weight":
        return ("model.norm.weight",)
    if name == "head.weight":
        return ("model.embed_tokens.weight" if config.tied_embeddings else HEAD,)
    _, index, parameter = name.split(".", 2)
    tensors = FUSED_TENSORS if config.fused else LAYER_TENSORS
    return tuple(f"model.layers.{first + int(index)}.{source}" for source in tensors[parameter])
