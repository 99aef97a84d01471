"""What configurations of each family mean, by transformers' own defaults; others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import FAMILIES as TOYS
from toy import check_best, write_toy
from transformers import AutoModelForCausalLM

from pyramidserve.errors import CheckpointError
from pyramidserve.types import Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model.config import ModelConfig, read_config
from workers.model.families import FAMILIES


def told(folder: Path, model_type: str, **settings: Any) -> ModelConfig:
    """What a config.json with ``settings`` and few others is read as."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 300}
    sizes["num_key_value_heads"] = 2
    told = sizes | {"model_type": model_type, "eos_token_id": 2, "pad_token_id": None} | settings
    (folder / "config.json").write_text(json.dumps(told))
    return read_config(folder)


def test_what_a_configuration_leaves_out_is_what_transformers_fills_in(tmp_path: Path) -> None:
    assert {TOYS[kind]["model_type"] for kind in TOYS} == FAMILIES.keys() - {"llama"}
    assert told(tmp_path, "mistral").windows == (4096,) * 4
    assert told(tmp_path, "mistral", sliding_window=None).windows == ()
    assert told(tmp_path, "qwen2", sliding_window=8, max_window_layers=2).windows == ()
    windowed = told(tmp_path, "qwen2", sliding_window=8, max_window_layers=2, use_sliding_window=True)
    assert windowed.windows == (0, 0, 8, 8)
    assert (windowed.attention_bias, windowed.output_bias) == (True, False)
    assert told(tmp_path, "qwen3").head_size == 128
    smollm = told(tmp_path, "smollm3")
    assert (smollm.unrotated, smollm.tied_embeddings) == ((3,), True)
    assert told(tmp_path, "smollm3", no_rope_layer_interval=2).unrotated == (1, 3)
    assert told(tmp_path, "phi3", partial_rotary_factor=0.75, num_key_value_heads=2).rotated == 12


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(
            ({"model_type": other}, f"a '{other}' model, which is not served; .*llama, mistral, qwen2")
            for other in ("gemma2", "mixtral", "qwen2_moe", "qwen3_moe", "olmo2", "granite", "cohere")
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window of .* is 0"),
        ({"model_type": "mistral", "sliding_window": 2.5}, "sliding_window|config.json"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "layer_types|config.json"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "layer_types .*chunked"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers|config.json"),
        ({"model_type": "qwen3", "hidden_act": "gelu"}, "activation 'gelu'; 'silu' is served"),
        ({"model_type": "qwen2", "partial_rotary_factor": 0.5}, "partial_rotary_factor .* is 0.5"),
        ({"model_type": "llama", "head_dim": 15}, "15"),
        ({"model_type": "llama", "rope_parameters": {"full_attention": {"factor": 2.0}}}, "full_att"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=named):
        told(tmp_path, **settings)


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "phi3"])
def test_one_layer_in_half_precision_and_in_many_files(kind: str, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", kind, layers=1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    engine, prompt = Engine(EngineConfig(str(folder), dtype="float32")), [1, *range(40, 90)]
    (reply,) = engine.generate([EngineRequest(prompt, stopping=Stopping(20, ignore_eos=True))])
    check_best(model.float(), prompt, reply.token_ids)
