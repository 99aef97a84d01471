"""Gates foresee by keys, wherever these stand, and by values; and what no gates are is refused."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression
from workers.budget.observation import KeysValues, RowAttention
from workers.model.config import ModelConfig, read_config
from workers.policies import measured
from workers.policies.capacity import CHUNK
from workers.policies.gates import Gates, features, read_gates
from workers.policies.measured import use_gates
from workers.policies.registry import plan, skew, versions
from workers.policies.settled import candidates, settled

WEIGHTS = np.random.default_rng(3).standard_normal((2, 3, 23)).astype(np.float32)


def test_a_gate_gives_each_heads_features_times_its_weights() -> None:
    kv = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    scores = Gates("m", WEIGHTS).of(1, torch.device("cpu"))(kv)
    for token, (keys, values) in enumerate(kv.double().tolist()):
        for head, (key, value) in enumerate(zip(keys, values, strict=True)):
            lengths = [key[pair] ** 2 + key[pair + 4] ** 2 for pair in range(4)]
            lengths += [sum(k * k for k in key), sum(v * v for v in value)]
            told = [*(math.log(length + 1e-6) for length in lengths), *value, *(v * v for v in value), 1.0]
            expected = sum(a * float(b) for a, b in zip(told, WEIGHTS[1, head], strict=True))
            assert scores[head, token].item() == pytest.approx(expected, abs=1e-4)


def test_features_are_the_same_wherever_a_token_stands() -> None:
    kv = torch.randn(7, 2, 8, generator=torch.Generator().manual_seed(1))
    angle = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    first, second = kv[:, 0].chunk(2, dim=-1)
    turned = kv.clone()
    turned[:, 0, :4] = first * angle.cos() - second * angle.sin()
    turned[:, 0, 4:] = second * angle.cos() + first * angle.sin()
    torch.testing.assert_close(features(turned), features(kv))


def test_gates_come_back_from_their_file(tmp_path: Path) -> None:
    gates = Gates("two layers", WEIGHTS)
    gates.write(tmp_path / "gates")
    read = read_gates(tmp_path / "gates")
    assert read.model == "two layers"
    assert (read.weights == WEIGHTS).all()
    assert read.digest == gates.digest != Gates("two layers", WEIGHTS + 1).digest


@pytest.fixture
def model(toy: Callable[[str], Path]) -> ModelConfig:
    return read_config(toy("gqa"))


@pytest.fixture
def gates(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for the model; what is taken in is forgotten again."""
    monkeypatch.setattr(measured, "GATES", {})
    Gates(model.fingerprint, WEIGHTS).write(tmp_path / "gates")
    return tmp_path / "gates"


def test_a_model_without_gates_is_refused_with_the_way_out(gates: Path, model: ModelConfig) -> None:
    asked = Compression("kvzap", kv_keep=0.5)
    with pytest.raises(
        InvalidRequestError, match=rf"{model.fingerprint}: run `pyramidserve calibrate DIR --gates FILE`"
    ):
        settled(asked, model, "float32", 100)
    assert "kvzap" not in {each.policy for each in candidates(model)}
    use_gates("")
    use_gates(str(gates))
    assert settled(asked, model, "float32", 100) == asked
    assert "kvzap" in {each.policy for each in candidates(model)}


def test_other_gates_are_another_version_of_what_chooses_by_them(gates: Path, model: ModelConfig) -> None:
    before = versions(model=model.fingerprint)
    use_gates(str(gates))
    after = versions(model=model.fingerprint)
    assert {name for name in after if after[name] != before[name]} == {"kvzap"}
    digest = Gates(model.fingerprint, WEIGHTS).digest
    assert skew(before, after) == f"policy 'kvzap' in version 1 here and 1 with gates {digest} there"
    assert versions(model="another") == before


def test_what_is_no_file_of_gates_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "gates"
    says = r"gates' cannot be read.*pyramidserve calibrate"
    with pytest.raises(ConfigurationError, match=says):
        read_gates(file)
    file.write_text("{")
    with pytest.raises(ConfigurationError, match=says):
        read_gates(file)
    for tensors, metadata in (
        ({"weights": WEIGHTS}, None),
        ({"other": WEIGHTS}, {"model": "m"}),
        ({"weights": WEIGHTS[0]}, {"model": "m"}),
        ({"weights": WEIGHTS.astype(np.float16)}, {"model": "m"}),
        ({"weights": WEIGHTS * np.nan}, {"model": "m"}),
    ):
        save_file(tensors, file, metadata)
        with pytest.raises(ConfigurationError, match=says):
            read_gates(file)


def test_generated_tokens_that_leave_the_window_are_cut_to_the_layers_share() -> None:
    keep = plan(Compression("kvzap", kv_keep=0.25, parameters={"layer_budget": [1, 3]}), 1000, 2)
    assert keep.kept == (125, 375)
    assert keep.observes == KeysValues()
    assert keep.recent == 32
    assert keep.generation is not None
    assert keep.generation.keeps == (2, 6)
    assert (keep.generation.chunk, keep.generation.window) == (CHUNK, 32)
    few = plan(Compression("kvzap", kv_keep=0.02), 1000, 2)
    assert few.recent == 8


def test_the_prompts_end_looks_as_well_where_that_is_asked_for() -> None:
    keep = plan(Compression("kvzap", kv_keep=0.25, parameters={"window_size": 200}), 1000, 2)
    assert keep.observes == RowAttention(rows=200, over_rows="max")
