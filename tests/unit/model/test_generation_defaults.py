"""How tokens are drawn where nobody says how."""

import json
from pathlib import Path

import pytest

from pyramidserve.errors import CheckpointError
from pyramidserve.types import Sampling
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import sampling_from_message
from workers.model.generation import sampling_defaults


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, Sampling()),
        ({"eos_token_id": 2}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling()),  # transformers does not draw then, either
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05},
            Sampling(0.6, 0.9, 20, repetition_penalty=1.05),
        ),
        ({"do_sample": True, "top_k": 0, "min_p": None}, Sampling(1.0)),
    ],
)
def test_a_model_says_how(said: dict[str, object] | None, expected: Sampling, tmp_path: Path) -> None:
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert sampling_defaults(tmp_path) == expected


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": "hot"}')
    with pytest.raises(CheckpointError, match=r"temperature in .* is 'hot'"):
        sampling_defaults(tmp_path)


def test_a_request_is_silent_field_by_field() -> None:
    default = Sampling(0.6, 0.9, 20, repetition_penalty=1.05)
    assert sampling_from_message(pb.Sampling(), default) == default
    asked = sampling_from_message(pb.Sampling(temperature=0.0, seed=3), default)
    assert asked == Sampling(0.0, 0.9, 20, 3, repetition_penalty=1.05)
