"""`pyramidserve bench engine`, on a toy whose numbers can be counted."""

import json
from pathlib import Path

import pytest
from toy import write_toy

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
        assert run["turns"] == {"prefill": 2 * LAYERS + 1, "decode": output - 1, "release": 1}
        assert run["output_tokens_per_second"] * run["wall_seconds"] == pytest.approx(output)
        assert run["prefill_seconds"] + run["decode_seconds"] <= run["wall_seconds"]
        assert run["prefill_tokens_per_second"] * run["prefill_seconds"] == pytest.approx(prompt)
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
    assert results["roofline_fraction"] > 0


@pytest.mark.parametrize("option", ["--threads", "--repetitions"])
def test_what_cannot_be_is_refused_by_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", option, "0"]) == 1
    assert f"{option} is 0; it must be 1 or more" in capsys.readouterr().err
