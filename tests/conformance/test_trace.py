"""`pyramidserve trace --json` says what every KV head has, after prefill and after generation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyramidserve.cli import main

LAYERS, KV_HEADS = 6, 2


def trace(folder: Path, checkpoint: Path, policy: str, parameters: dict[str, Any], generate: int) -> Any:
    """What is written of a prompt of 40 tokens."""
    files = {"ids": list(range(3, 43)), "params": parameters}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    command = ["trace", "--model", str(checkpoint), "--policy", policy, "--generate", str(generate)]
    options = [f"--{name}={folder / name}" for name in files]
    assert main([*command, *options, "--kv-bytes", str(8 << 20), "--json", str(folder / "out")]) == 0
    return json.loads((folder / "out").read_text())


@pytest.mark.parametrize("tokens", [12, [30, 12, 9, 12, 7, 12]])
def test_heads_have_positions_of_their_own(
    tokens: int | list[int], tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    parameters = {"tokens": tokens, "drop": 1}
    before, after = (trace(tmp_path, toy("gqa"), "h2o", parameters, generate) for generate in (0, 21))
    wanted = tokens if isinstance(tokens, list) else [tokens] * LAYERS
    prefilled, generated = (told["retained_positions_per_layer_head"] for told in (before, after))
    for layers, fed in ((prefilled, 0), (generated, 20)):
        assert [[len(own) for own in heads] for heads in layers] == [[count] * KV_HEADS for count in wanted]
        assert all(own == sorted(own) for heads in layers for own in heads)
        assert {heads[0][-1] for heads in layers} == {39 + fed}
    assert any(heads[0] != heads[1] for heads in prefilled)
    assert after["retained_positions_per_layer_head_after_prefill"] == prefilled
    union = [sorted({*heads[0], *heads[1]}) for heads in prefilled]
    assert before["retained_positions_per_layer"] == after["retained_positions_per_layer"] == union
    assert len(after["output_ids"]) == 21
    assert "output_ids" not in before


def test_one_set_is_that_of_every_head(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    told = trace(tmp_path, toy("gqa"), "tova", {"tokens": 9}, 0)
    for heads, together in zip(
        told["retained_positions_per_layer_head"], told["retained_positions_per_layer"], strict=True
    ):
        assert heads == [together] * KV_HEADS
        assert len(together) == 9
