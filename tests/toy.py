"""Toy random LLaMA checkpoints of every kind, written as transformers writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.model.byte_tokenizer import SPECIAL, byte_tokenizer
from workers.schedule.tuning import ScheduleTuning

VOCABULARY = len(SPECIAL) + 256
CONTEXT = 256
# Logits that are closer than this are a tie.
MARGIN = 1e-3
# Sessions never prefill again what they could lift.
LIFT_AT_ONCE = ScheduleTuning(lifted_row=1e-9)

# A kind of LLaMA by name → what it changes in the configuration.
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 32},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": CONTEXT // 2,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e5,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
        }
    },
    "long": {"max_position_embeddings": 4096},
    "wide-kv": {"max_position_embeddings": 4096, "head_dim": 128, "num_key_value_heads": 4},
    "wide": {
        "max_position_embeddings": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "head_dim": 128,
        "num_key_value_heads": 4,
        "initializer_range": 0.05,
    },
    "codellama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def check_best(model: LlamaForCausalLM, prompt: Sequence[int], said: Sequence[int]) -> None:
    """Asserts that each token of ``said`` is ``model``'s best behind those before it, but for near ties."""
    tokens = torch.tensor([*prompt, *said])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, tokens[len(prompt) :, None])[:, 0]
    assert (logits.max(dim=1).values - chosen).max() < MARGIN


def write_toy(folder: Path, kind: str = "gqa", layers: int = 6, seed: int = 0) -> Path:
    """Writes a random LLaMA of ``kind`` to ``folder``, fp32, with a tokenizer of single bytes."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | KINDS[kind])))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
