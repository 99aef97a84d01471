"""transformers' own LLaMA on the same weights, in the same memory."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, LlamaForCausalLM

from workers.model.config import ModelConfig
from workers.model.llama import LlamaStage
from workers.model.weights import source_names


def transformers_twin(stage: LlamaStage, model: ModelConfig, checkpoint: Path) -> Any:
    """A ``LlamaForCausalLM`` whose parameters are parts of those of ``stage``, which has all layers."""
    config = AutoConfig.from_pretrained(checkpoint, attn_implementation="sdpa")
    with init_empty_weights():
        twin = LlamaForCausalLM(config)
    width, kv_width = model.heads * model.head_size, model.kv_heads * model.head_size
    sizes = {
        "qkv": [width, kv_width, kv_width],
        "gate_up": [model.intermediate, model.intermediate],
    }
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in stage.named_parameters(remove_duplicate=False):
        parts = sizes.get(name.split(".")[-2], [len(parameter)])
        weights |= dict(zip(source_names(name, 0, model), torch.split(parameter.data, parts), strict=True))
    twin.load_state_dict(weights, assign=True)
    twin.model.rotary_emb.to(parameter.device)
    return twin.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
