"""Random weights: the same on every device and in every split, and of any shape."""

import json
from pathlib import Path

import pytest
import torch
from toy import write_toy

from pyramidserve.errors import CheckpointError
from pyramidserve.types import Stopping
from workers.backends.reference import ReferenceBackend
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model import random_model
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.random_model import GAIN, fill, random_checkpoint
from workers.model.shapes import SHAPES
from workers.model.weights import load_stage

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYRAMIDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(name: str, size: int, seed: int = 0) -> torch.Tensor:
    value = torch.empty(size, 64)
    fill(value, name, seed)
    return value


def test_weights_are_a_function_of_seed_name_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights("layers.0.up", 1000)
    # As these are, they are to stay: recordings hang on them.
    assert first[0, :3].tolist() == pytest.approx([0.15187389, 0.27049115, -0.08772480], abs=1e-7)
    assert torch.equal(first[:100], weights("layers.0.up", 100))
    monkeypatch.setattr(random_model, "CHUNK", 1 << 10)
    assert torch.equal(first, weights("layers.0.up", 1000))
    for other in (weights("layers.1.up", 1000), weights("layers.0.up", 1000, seed=1)):
        assert abs(torch.corrcoef(torch.stack((first.view(-1), other.view(-1))))[0, 1]) < 0.02
    assert weights("model.norm.weight", 3).eq(1).all()


def test_weights_look_drawn() -> None:
    values = weights("x", 4000) * 64**0.5
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(GAIN, rel=0.01)
    columns = torch.corrcoef(values.T) - torch.eye(64)
    assert columns.abs().max() < 0.1
    assert len(set(values.view(-1).tolist())) > 0.98 * values.numel()


def test_layers_are_the_same_however_they_are_split(cache: Path) -> None:
    checkpoint = resolve_checkpoint("random:toy?seed=3")
    config = read_config(checkpoint)
    kernels = ReferenceBackend(torch.float32)

    def layers(first: int, end: int) -> list[torch.Tensor]:
        stage, names = load_stage(checkpoint, config, first, end, torch.float32, CPU, kernels)
        assert f"model.layers.{end - 1}.mlp.up_proj.weight" in names
        return [p for name, p in stage.named_parameters() if name.startswith("layers")]

    assert all(map(torch.equal, layers(0, 6), [*layers(0, 2), *layers(2, 5), *layers(5, 6)]))


def test_a_name_gives_a_folder_that_is_made_once(cache: Path) -> None:
    folder = resolve_checkpoint("random:llama-2-13b")
    assert folder == resolve_checkpoint("random:llama-2-13b")
    assert folder != resolve_checkpoint("random:llama-2-13b?seed=1")
    assert not list(cache.rglob("*.safetensors"))
    config = read_config(folder)
    expected = {**vars(SHAPES["llama-2-13b"]), "random_seed": 0}
    assert vars(config) == expected
    assert len(list((cache / "random").iterdir())) == 2


def test_an_engine_runs_on_them_and_decodes_ids_beyond_its_tokenizer(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", "tied")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    request = EngineRequest("hello", stopping=Stopping(20, ignore_eos=True))
    told = []
    checkpoint = str(random_checkpoint(f"random:{folder}", tmp_path))
    for boundaries in ((), (2, 5)):
        engine = Engine(EngineConfig(checkpoint, dtype="float32", boundaries=boundaries))
        (reply,) = engine.generate([request])
        told.append(reply.token_ids)
    assert told[0] == told[1]
    assert max(told[0]) > 259


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random:", "give random:SHAPE or random:SHAPE"),
        ("random:llama-3", "no shape 'llama-3' for random weights: .* llama-2-13b.* nor a folder"),
        ("random:toy?seed=x", "no shape"),
    ],
)
def test_a_shape_that_is_not_known_is_named(name: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        resolve_checkpoint(name)
