"""A checkpoint of any kind says what transformers says of it, or is refused by name; nothing is silent."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import examples
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toy import check_best, write_toy
from toy_gguf import with_bytes_and_pair, write_gguf
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from pyramidserve.errors import CheckpointError
from pyramidserve.types import Reply, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model.checkpoint import convert_gguf, resolve_checkpoint
from workers.model.config import read_config

PROMPTS = [[1, 50, 60, 70], [1, *(3 + i * 37 % 250 for i in range(90))]]

Quantise = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def _says(checkpoint: Path, **changed: Any) -> list[Reply]:
    engine = Engine(EngineConfig(str(checkpoint), dtype="float32", **changed))
    stopping = Stopping(24, ignore_eos=True)
    return engine.generate([EngineRequest(ids, stopping=stopping) for ids in PROMPTS])


def _is_what_it_says(model: PreTrainedModel, replies: list[Reply]) -> None:
    """Asserts that each token is ``model``'s best, but for near ties."""
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        check_best(model, prompt, reply.token_ids)


def _edit(file: Path, **new: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


# Quantised safetensors


def _tensor_fp8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    beside = {f"{name}_scale": scale[None], name.replace("weight", "input_scale"): torch.ones(1)}
    return {name: numbers, **beside}, numbers.float() * scale


def _row_int8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round().to(torch.int8)
    return {name: numbers, f"{name}_scale": scale}, numbers.float() * scale


def _block_fp8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    each = torch.nn.functional.pad(weight, (0, -columns % 32, 0, -rows % 32))
    tiles = each.view(len(each) // 32, 32, each.shape[1] // 32, 32)
    scale = tiles.abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
    numbers = (weight / spread).to(torch.float8_e4m3fn)
    return {name: numbers, f"{name}_scale_inv": scale}, numbers.float() * spread


def _bitsandbytes(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round().to(torch.int8)
    beside = {name.replace("weight", "SCB"): largest, f"{name}_format": torch.tensor(0, dtype=torch.uint8)}
    return {name: numbers, **beside}, numbers.float() * largest[:, None] / 127


QUANTISED: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "fp8 a tensor": (_tensor_fp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "int8 a row": (_row_int8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "fp8 a block": (_block_fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "bitsandbytes": (_bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("boundaries", [(), (1, 2)])
def test_quantised_weights_say_what_they_stand_for(
    kind: str, boundaries: tuple[int, ...], tmp_path: Path
) -> None:
    quantise, told = QUANTISED[kind]
    folder = write_toy(tmp_path / "toy", layers=3)
    weights, plain = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        quantised, plain[name] = quantise(name, weights[name])
        weights |= quantised
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(folder / "config.json", quantization_config=told)
    replies = _says(folder, boundaries=boundaries)
    model = LlamaForCausalLM.from_pretrained(write_toy(tmp_path / "plain", layers=3), dtype=torch.float32)
    model.load_state_dict(model.state_dict() | plain)
    _is_what_it_says(model, replies)


def test_numbers_of_8_bits_without_a_scale_are_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, layers=2)
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight.*float8_e4m3fn, and no scale"):
        _says(folder)


def test_a_tensor_that_nobody_asked_for_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, layers=2)
    weights = load_file(folder / "model.safetensors")
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(weights | harmless, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(_says(folder)) == len(PROMPTS)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(weights | bias, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"config.json says nothing of: model.layers.0.self_attn.q_proj.bias"
    ):
        _says(folder)
    _edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model.layers.1.*and 5 more"):
        _says(folder)
    _edit(folder / "config.json", num_hidden_layers=2**40)
    with pytest.raises(CheckpointError, match=r"22 tensors, too few for the 1099511627776 layers"):
        _says(folder)


# What ends a reply


def test_what_ends_a_reply_is_told_by_all_three_files(tmp_path: Path) -> None:
    folder = write_toy(tmp_path, layers=2)
    _edit(folder / "config.json", eos_token_id=5)
    _edit(folder / "generation_config.json", eos_token_id=[6, 7])
    assert read_config(folder).eos_ids == (5, 6, 7)
    said = _says(folder)[0].token_ids
    for place, end in ((4, "generation_config.json"), (9, "tokenizer_config.json")):
        token = said[place]
        first = said.index(token)
        if end == "generation_config.json":
            _edit(folder / end, eos_token_id=[2, token])
        else:
            _edit(folder / "generation_config.json", eos_token_id=[2])
            _rename_end(folder, token)
        engine = Engine(EngineConfig(str(folder), dtype="float32"))
        (reply,) = engine.generate([EngineRequest(PROMPTS[0], stopping=Stopping(24))])
        assert reply.receipt.finish_reason.name == "EOS"
        assert len(reply.token_ids) == first + 1


def _rename_end(folder: Path, token: int) -> None:
    """Makes ``token`` the tokenizer's end."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (text,) = (text for text, number in vocabulary.items() if number == token)
    _edit(folder / "tokenizer_config.json", eos_token=text)


# GGUF


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """A toy that a GGUF of bytes and a pair fits."""
    folder = write_toy(tmp_path_factory.mktemp("plain"), layers=3)
    return with_bytes_and_pair(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRAMIDSERVE_CACHE", str(tmp_path / "cache"))


def _converted(path: Path) -> Path:
    folder = path.parent / "converted"
    convert_gguf(path, folder, lambda _: None)
    return folder


@pytest.mark.parametrize("tensors_a_part", [0, 7])
def test_a_gguf_file_says_what_it_was_made_of(
    model: LlamaForCausalLM, tensors_a_part: int, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "toy.gguf", model, tensors_a_part=tensors_a_part)
    assert len(list(tmp_path.glob("*.gguf"))) == (5 if tensors_a_part else 1)
    _is_what_it_says(model, _says(_converted(path), boundaries=(1,)))


@pytest.mark.parametrize("kind", ["tied", "biases", "wide-heads", "mqa", "mha"])
def test_a_gguf_file_of_every_shape(kind: str, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / kind, kind, layers=2)
    model = with_bytes_and_pair(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    _is_what_it_says(model, _says(_converted(write_gguf(tmp_path / "toy.gguf", model))))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "phi3-partial"])
def test_a_gguf_file_of_every_family(kind: str, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / kind, kind, layers=2)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = with_bytes_and_pair(model)
    more: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if kind == "phi3-partial":  # as convert_hf_to_gguf.py writes it
        rope = model.config.rope_parameters
        more = {"phi3.rope.scaling.original_context_length": 100, "phi3.attention.sliding_window": 40}
        more["phi3.rope.scaling.attn_factor"] = float(model.model.rotary_emb.attention_scaling)
        extra = {
            f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"], np.float32)
            for which in ("long", "short")
        }
    path = write_gguf(tmp_path / "toy.gguf", model, metadata=more, extra=extra)
    _is_what_it_says(model, _says(_converted(path)))


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_a_gguf_file_scales_its_positions(
    model: LlamaForCausalLM,
    metadata: dict[str, Any],
    rope: dict[str, Any],
    tmp_path: Path,
) -> None:
    named = {f"llama.{key}": value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "toy.gguf", model, metadata=named)
    _is_what_it_says(_turned(model, rope), _says(_converted(path)))


def test_a_gguf_file_of_llama_3_divides_its_frequencies(model: LlamaForCausalLM, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    turned, plain = _turned(model, rope), model.model.rotary_emb.inv_freq
    factors = (plain / turned.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() == 8
    path = write_gguf(tmp_path / "toy.gguf", model, extra={"rope_freqs.weight": factors})
    _is_what_it_says(turned, _says(_converted(path)))


def _turned(model: LlamaForCausalLM, rope: dict[str, Any]) -> LlamaForCausalLM:
    config = type(model.config)(**model.config.to_dict() | {"rope_parameters": {"rope_theta": 1e4, **rope}})
    turned = LlamaForCausalLM(config)
    turned.load_state_dict(model.state_dict())
    return turned


def test_a_gguf_file_names_all_that_ends_a_reply(model: LlamaForCausalLM, tmp_path: Path) -> None:
    more = {"tokenizer.ggml.eot_token_id": 40, "tokenizer.ggml.eom_token_id": 41}
    folder = _converted(write_gguf(tmp_path / "toy.gguf", model, metadata=more))
    assert read_config(folder).eos_ids == (2, 40, 41)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"lacks": ["blk.1.ffn_up.weight"]}, r"lacks model.layers.1.mlp.up_proj.weight"),
        ({"lacks": ["token_embd.weight"]}, r"lacks token_embd.weight"),
        (
            {"extra": {"blk.0.ffn_gate_exps.weight": np.ones((2, 4), np.float32)}},
            r"'blk.0.ffn_gate_exps.weight'",
        ),
        (
            {"extra": {"blk.1.attn_q.bias": np.ones(64, np.float32)}},
            r"says nothing of: .*1.self_attn.q_proj.bias",
        ),
        ({"metadata": {"llama.block_count": None}}, r"does not say its llama.block_count"),
        ({"metadata": {"llama.rope.scaling.type": "su"}}, r"scales its positions by 'su'"),
    ],
)
def test_a_gguf_file_that_is_not_whole_is_refused_by_name(
    model: LlamaForCausalLM, how: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "toy.gguf", model, **how)
    for _ in range(2):  # nothing is kept of it
        with pytest.raises(CheckpointError, match=named):
            resolve_checkpoint(str(path))


@pytest.mark.usefixtures("_own_cache")
def test_a_part_that_is_missing_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "toy.gguf", model, tensors_a_part=7)
    (tmp_path / "toy-00003-of-00005.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"of its parts toy-00003-of-00005.gguf are not in"):
        resolve_checkpoint(str(first))
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"one of 5 parts.*keep the names"):
        resolve_checkpoint(str(renamed))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    ("quantised", "kept"),
    [(None, "float32"), (GGMLQuantizationType.F16, "float16"), (GGMLQuantizationType.Q8_0, "bfloat16")],
)
def test_what_a_gguf_file_is_kept_as(
    model: LlamaForCausalLM, quantised: GGMLQuantizationType | None, kept: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "toy.gguf", model, quantised=quantised)
    assert read_config(resolve_checkpoint(str(path))).dtype == kept
    folder = resolve_checkpoint(f"{path}?dtype=float32")
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    with pytest.raises(
        CheckpointError, match=r"dtype 'int4' of .*choose one of float32, bfloat16, float16"
    ):
        resolve_checkpoint(f"{path}?dtype=int4")


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("left", [3, 100, 5000, 0.9])
def test_a_damaged_gguf_file_is_an_error_that_names_it(
    model: LlamaForCausalLM, left: float, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "toy.gguf", model)
    content = path.read_bytes()
    path.write_bytes(content[: int(left if left > 1 else left * len(content))])
    with pytest.raises(CheckpointError, match=r"toy.gguf cannot be read"):
        resolve_checkpoint(str(path))


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_gguf_file_with_any_header_is_read_or_refused(
    model: LlamaForCausalLM, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "toy.gguf"
    content = bytearray((path if path.exists() else write_gguf(path, model)).read_bytes())
    header = content.index(b"blk.2.ffn_down.weight")
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(changed)
    with suppress(CheckpointError):
        folder = _converted(damaged)
        shutil.rmtree(folder)


@pytest.mark.usefixtures("_own_cache")
def test_processes_that_want_the_same_file_convert_it_once(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path, told = write_gguf(tmp_path / "toy.gguf", model), list[str]()
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda _: resolve_checkpoint(str(path), told.append), range(4)))
    assert len(folders) == 1
    assert told == ["converting toy.gguf to safetensors, once"]


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_gguf_file_holds_what_transformers_reads_of_it(
    model: LlamaForCausalLM, quantised: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "toy.gguf", model, quantised=GGMLQuantizationType[quantised])
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(resolve_checkpoint(f"{path}?dtype=float32") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
