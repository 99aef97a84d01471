"""`pyramidserve bench engine`, on a toy whose numbers can be counted."""

import json
from pathlib import Path

import pytest
import torch
from toy import write_toy

from cluster.commands import bench
from pyramidserve.cli import main
from workers.bench.workload import WORKLOADS
from workers.model.config import read_config

REQUESTS, LAYERS = WORKLOADS["W1"], 6


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("long"), "long")


@pytest.mark.parametrize("policy", ["full", "pyramid"])
def test_a_workload_is_measured(
    policy: str, long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    keep = ["--kv-keep", "0.45"] if policy == "pyramid" else []
    command = ["bench", "engine", "--workload", "W1", "--model", str(long), "--threads", "1"]
    assert main([*command, "--policy", policy, *keep, "--repetitions", "2", "--json", str(out)]) == 0
    assert "output tokens/s" in capsys.readouterr().err
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 2
    prompt, output = REQUESTS.prompt, REQUESTS.output
    for run in results["runs"]:
        turns = {kind: count for kind, count in run["turns"].items() if count}
        assert turns == {"prefill": 2 * LAYERS + 1, "decode": output - 1, "release": 1}
        assert run["output_tokens_per_second"] * run["wall_seconds"] == pytest.approx(output)
        assert run["prefill_seconds"] + run["decode_seconds"] <= run["wall_seconds"]
        assert 0 < run["prefill_tokens_per_second"] <= prompt / run["prefill_seconds"]
        assert run["decode_tokens_per_second"] > run["output_tokens_per_second"]
        assert 0 < run["kv_bytes_mean"] <= run["kv_bytes_decoding"] <= run["kv_bytes_peak"]
        assert 0 < run["inter_token_p50"] <= run["inter_token_p99"]
        assert run["kv_keep_reached"] == pytest.approx(0.45 if policy == "pyramid" else 1, abs=0.01)
    model = read_config(long)
    per_token = (
        model.layers * 2 * model.kv_heads * model.head_size * (4 if results["dtype"] == "float32" else 2)
    )
    full = (prompt + output) * per_token
    if policy == "full":
        assert full * 0.95 < results["kv_bytes_peak"] <= full
    else:
        assert results["kv_bytes_peak"] < 0.75 * full
    assert sum(results["step_shares"].values()) == pytest.approx(1)
    spent = {what for what, share in results["step_shares"].items() if share > 0}
    everywhere = {"gemm", "attention", "elementwise", "python"}
    assert spent == everywhere | ({"selection"} if policy == "pyramid" else set())
    assert set(results["roofline"]) == {"prefill", "decode_step", "whole"}
    assert all(share > 0 for share in results["roofline"].values())


def test_shards_of_processes_are_measured_too(long: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["bench", "engine", "--workload", "W1", "--model", str(long), "--shards", "2"]
    assert main([*command, "--threads", "2", "--repetitions", "1", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    model = read_config(long)
    per_token = model.layers * 2 * model.kv_heads * model.head_size
    per_token *= 4 if results["dtype"] == "float32" else 2
    # Both shards' pages are counted.
    assert results["kv_bytes_peak"] > 0.95 * (REQUESTS.prompt + REQUESTS.output) * per_token
    assert results["runs"][0]["turns"]["decode"] == REQUESTS.output - 1


def test_how_long_streams_are_held_up_is_measured(
    long: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LATE_PROMPT", 3000)
    out = tmp_path / "out.json"
    command = ["bench", "stall", "--model", str(long), "--threads", "1", "--repetitions", "2"]
    assert main([*command, "--policy", "pyramid", "--kv-keep", "0.45", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 2
    for run in results["runs"]:
        assert 0 < run["quiet_p50"] < run["busy_p50"] <= run["busy_p99"] < run["late_ttft"]
    assert "times as long" in capsys.readouterr().out


def test_more_shards_than_layers_are_refused(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--model", str(long), "--shards", "7"]) == 1
    assert "--shards is 7; the model has 6 layers" in capsys.readouterr().err


def test_a_device_that_is_not_there_or_not_measured_is_refused(
    long: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "engine", "--model", str(long), "--device", "tpu"]) == 1
    assert "device is 'tpu', which torch does not know" in capsys.readouterr().err
    monkeypatch.setattr(bench, "open_device", torch.device)
    assert main(["bench", "engine", "--model", str(long), "--device", "cuda", "--shards", "2"]) == 1
    assert "--shards is 2 and --device 'cuda': processes are measured on CPUs" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--threads", "--repetitions", "--shards"])
def test_what_cannot_be_is_refused_by_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", option, "0"]) == 1
    assert f"{option} is 0; it must be 1 or more" in capsys.readouterr().err
