"""Files of a checkpoint that are damaged in any way are read right or refused by a CheckpointError."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import write_toy

from pyramidserve.errors import CheckpointError
from workers.model.config import ModelConfig, read_config
from workers.model.rope import Rope
from workers.model.tokenizer import Tokenizer

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 5), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.integers(-1, 3), max_size=3),
)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), "llama3", layers=1)


@pytest.fixture(scope="module")
def damaged(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files a test may overwrite."""
    folder = tmp_path_factory.mktemp("damaged") / "toy"
    shutil.copytree(toy_folder, folder)
    return folder


def _is_sound(model: ModelConfig) -> bool:
    sizes = (model.layers, model.hidden, model.heads, model.kv_heads, model.head_size, model.intermediate)
    return min(*sizes, model.vocabulary, model.context) > 0 and model.heads % model.kv_heads == 0


@settings(max_examples=examples(200))
@given(data=st.data())
def test_a_config_with_any_value_is_sound_or_refused(
    toy_folder: Path, damaged: Path, data: st.DataObject
) -> None:
    told: dict[str, Any] = json.loads((toy_folder / "config.json").read_text())
    rope = told["rope_parameters"]
    place = data.draw(st.sampled_from([told, rope]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ANYTHING)
    (damaged / "config.json").write_text(json.dumps(told))
    with suppress(CheckpointError):
        model = read_config(damaged)
        assert _is_sound(model)
        Rope(damaged, model, torch.device("cpu"))


@settings(max_examples=examples(60))
@given(
    data=st.data(),
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
)
def test_files_with_any_bytes_are_read_or_refused(
    toy_folder: Path, damaged: Path, data: st.DataObject, name: str
) -> None:
    shutil.copytree(toy_folder, damaged, dirs_exist_ok=True)
    content = bytearray((toy_folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (damaged / name).write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    with suppress(CheckpointError):
        read_config(damaged)
        Tokenizer(damaged).encode("a b")
