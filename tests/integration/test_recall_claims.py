"""Commands behind what is said of recall run, at a small size, and say what they are asked for."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Threads that wait for each other would take many times as long where others use the cores too.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def measured(name: str, folder: Path, *options: str) -> tuple[str, Any]:
    """What `python -m bench.recall.NAME` says, and what it writes into ``folder``."""
    output = folder / "out.json"
    run = [sys.executable, "-m", f"bench.recall.{name}", *options, "--output", str(output)]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, json.loads(output.read_text())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("step --prompts 300 --texts 1 --goes-on 32", r"300 tokens, step: NLL \d"),
        ("facts --talks 1 --tokens 200", r"evict turn .* recovers"),
    ],
)
def test_a_measurement_of_recall_runs(command: str, says: str, tmp_path: Path, embedded: Path) -> None:
    name, *options = command.split()
    said, told = measured(name, tmp_path, *options)
    assert re.search(says, said), said
    assert told


def test_how_soon_a_turn_begins_is_measured_in_every_mode(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    sizes = ["--tokens", "600", "--turns", "2", "--runs", "1"]
    said, told = measured("turns", tmp_path, "--model", str(toy("long")), *sizes)
    assert len(said.splitlines()) == 7
    modes = {each["mode"]: each for each in told}
    assert len(modes) == 7
    for each in modes.values():
        assert [len(turn) for turn in each["shares"]] == [1, 1]
        assert all(0 < share < math.inf for turn in each["shares"] for share in turn)
    # `evict` spills the prompt's KV, `prune` with recall its hidden states.
    spilled = {mode: each["spilled_per_token"] for mode, each in modes.items()}
    assert spilled["evict off"] > spilled["full"] == 0
    assert spilled["prune turn"] > spilled["prune off"]


def test_exact_is_compared_with_full_and_timed_beside_it(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    sizes = ["--prompts", "1", "--tokens", "300", "--reply", "12", "--runs", "1", "--sequences", "2"]
    said, told = measured("exact", tmp_path, "--model", str(toy("long")), *sizes)
    assert "300 tokens, 25 GB/s, 2 at once, tokens/s: full" in said
    assert [each["shards"] for each in told["equal"]] == [1, 2]
    for each in told["equal"]:
        assert 0 < each["tokens_compared"] <= 12
        assert 0 <= each["acceptance"] <= 1
        assert each["accepted_a_verification"] >= 0
        assert 0 < each["host_bytes_per_token_of_spilled"] < math.inf
        assert each["device_share"] == pytest.approx(0.45, abs=0.02)
    assert [each["gigabytes"] for each in told["speed"]] == [25, 5]
    for each in told["speed"]:
        assert set(each["runs"]) == {"full", "off", "step", "exact"}
        for rate, right, accepted in (run for runs in each["runs"].values() for run in runs):
            assert 0 < rate < math.inf
            assert 0 <= right <= 1
            assert accepted >= 0


def test_replies_are_compared_where_the_device_has_fewer_bits_than_the_host(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    sizes = ["--prompts", "1", "--tokens", "--reply", "12", "--kv-dtype", "int8", "--kv-keep", "0.48"]
    _, told = measured("exact", tmp_path, "--model", str(toy("long")), *sizes)
    assert [each["kv_dtype"] for each in told["equal"]] == ["int8", "int8"]
    for each in told["equal"]:
        assert 0 < each["tokens_compared"] <= 12
        assert each["device_share"] == pytest.approx(0.48, abs=0.02)
        assert each["device_bytes_of_16_bits"] < each["device_share"] * 0.75


def test_shapes_of_prune_are_measured_with_one_another(tmp_path: Path) -> None:
    sizes = ["--prompts", "160", "--texts", "1", "--talks", "1", "--document", "200"]
    out = tmp_path / "shapes.json"
    command = [sys.executable, "-m", "bench.shapes", *sizes, "--output", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=ENVIRONMENT)
    told = {name: own["told"] for name, own in json.loads(out.read_text()).items()}
    assert len(told) == 15
    for name, own in told.items():
        assert own["kept_160"] == pytest.approx(1.0 if name == "full" else 0.45, abs=0.06)
        assert math.isfinite(own["worse_160"])
        assert own["seconds"] > 0
