"""Toy random checkpoints of every kind and family, written as transformers writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workers.model.byte_tokenizer import SPECIAL, byte_tokenizer
from workers.schedule.tuning import ScheduleTuning

VOCABULARY = len(SPECIAL) + 256
CONTEXT = 256
# Logits that are closer than this are a tie.
MARGIN = 1e-3
# Sessions never prefill again what they could lift.
LIFT_AT_ONCE = ScheduleTuning(lifted_row=1e-9)

# Factors of all the frequencies of a toy's head, for short sequences and for long ones.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0],
    "rope_theta": 1e4,
}
# A kind of LLaMA by name → what it changes in the configuration.
LLAMAS: dict[str, dict[str, Any]] = {
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
    "longrope": {
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 100, "factor": 2.56},
    },
    "codellama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


# Another family by name → what it is, and what it changes.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 90},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 3,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-window": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 33,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "smollm3": {"model_type": "smollm3"},
    "smollm3-window": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 17,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "phi3": {"model_type": "phi3"},
    "phi3-partial": {
        "model_type": "phi3",
        "num_key_value_heads": 1,
        "sliding_window": 40,
        "original_max_position_embeddings": 100,
        "rope_parameters": LONGROPE
        | {
            "short_factor": LONGROPE["short_factor"][:6],
            "long_factor": LONGROPE["long_factor"][2:],
            "partial_rotary_factor": 0.75,
        },
    },
}
KINDS = LLAMAS | FAMILIES


def check_best(model: PreTrainedModel, prompt: Sequence[int], said: Sequence[int]) -> None:
    """Asserts that each token of ``said`` is ``model``'s best behind those before it, but for near ties."""
    tokens = torch.tensor([*prompt, *said])
    with torch.no_grad():  # as long as its KV became: frequencies may hang on that
        logits = model(tokens[None, :-1]).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, tokens[len(prompt) :, None])[:, 0]
    assert (logits.max(dim=1).values - chosen).max() < MARGIN


def write_toy(folder: Path, kind: str = "gqa", layers: int = 6, seed: int = 0) -> Path:
    """Writes a random model of ``kind`` to ``folder``, fp32, with a tokenizer of single bytes."""
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
        "pad_token_id": None,
        "model_type": "llama",
    }
    settings |= KINDS[kind]
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
