"""Commands that the documents name and no other test runs, as they are typed, at a small size."""

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
import yaml
from cluster_process import PYRAMIDSERVE, free_port, write_config

from cluster.load.trace import Session, Turn, write_trace

ROOT = Path(__file__).parents[2]
# Toys are too small to share among threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: Any) -> str:
    """What a command that succeeds says."""
    words = list(map(str, command))
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


def test_a_trace_shows_draws_and_writes_what_each_layer_keeps(
    toy: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text((ROOT / "README.md").read_text()[:600])
    prompt = ["--text", tmp_path / "prompt.txt", "--model", toy("long"), "--kv-keep", 0.45]
    said = run(PYRAMIDSERVE, "trace", *prompt, "--png", tmp_path / "k.png", "--json", tmp_path / "k.json")
    told = json.loads((tmp_path / "k.json").read_text())
    assert told["kv_keep_reached"] == pytest.approx(0.45, abs=0.01)
    kept = list(map(len, told["retained_positions_per_layer"]))
    assert kept == sorted(kept, reverse=True)
    assert "of 0.450 asked for kept" in said
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


def test_the_simulator_predicts_from_what_the_engine_measured(tmp_path: Path) -> None:
    files = [tmp_path / "full.json", tmp_path / "pyramid.json"]
    for file, policy in zip(files, ([], ["--policy", "pyramid", "--kv-keep", "0.45"]), strict=True):
        sizes = ["--model", "random:toy", "--workload", "4x256+32", "--device", "cpu"]
        said = run(PYRAMIDSERVE, "bench", "engine", *sizes, *policy, "--repetitions", 1, "--json", file)
        assert "4 x (256 + 32) tokens" in said
        told = json.loads(file.read_text())
        assert 0 < told["output_tokens_per_second"] < math.inf
        assert 0 < told["roofline"]["whole"] < 1
    full, pyramid = (json.loads(file.read_text())["kv_bytes_peak"] for file in files)
    assert pyramid < full
    out = tmp_path / "out.json"
    said = run(PYRAMIDSERVE, "simulate", "--measured", files[0], "--check", files[1], "--json", out)
    told = json.loads(out.read_text())
    assert re.search(r"median error \d+% over 1, at most \d+%", said)
    assert min(told["costs"].values()) >= 0
    (checked,) = told["results"]
    assert 0 < checked["predicted_seconds"] < math.inf
    assert checked["error"] == pytest.approx(checked["predicted_seconds"] / checked["measured_seconds"] - 1)


def test_simulated_clusters_and_their_decisions_are_told_of(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    setup = ["--model", "7b", "--policy", "pyramid", "--kv-keep", 0.45, "--json", out]
    load = ["--pipelines", 1, 10, "--rate", 4, "--seconds", 15, "--warm-up", 3]
    run(PYRAMIDSERVE, "simulate", *setup, *load)
    told = json.loads(out.read_text())["results"]
    assert [each["pipelines"] for each in told] == [1, 10]
    for each in told:
        assert 0 < each["decisions_per_second"] < math.inf
        assert 0 < each["ttft_p50"] <= each["ttft_p99"] < math.inf
        assert 0 < each["memory_filled"] < 1
    assert told[1]["requests_per_second"] > 5 * told[0]["requests_per_second"]


@pytest.mark.parametrize("wire", ["grpc", "http"])
def test_what_the_path_to_the_engine_costs_is_measured(
    wire: str, toy: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    sizes = ["--workload", "2x64+16", "--pairs", 1, "--prompts", 2, "--port", free_port()]
    sizes += ["--wire", wire, "--http-port", free_port()]
    said = run(sys.executable, "-m", "bench.path", "--model", toy("long"), *sizes, "--output", out)
    assert "2x64+16: the path costs" in said
    assert "the first token comes" in said
    told = json.loads(out.read_text())
    (pair,) = told["pairs"]
    assert set(pair) == {"cluster", "process", "router_cpu", "head_cpu"}
    assert all(map(math.isfinite, pair.values()))
    assert min(pair["cluster"], pair["process"]) > 0
    assert len(told["first_tokens"]) == 2
    assert all(0 < seconds < math.inf for both in told["first_tokens"] for seconds in both)


def test_what_holding_output_to_a_schema_costs_is_measured(
    toy: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    sizes = ["--workload", "2x64+16", "--pairs", 2, "--output", out]
    said = run(sys.executable, "-m", "bench.masks", "--model", toy("long"), *sizes)
    assert "where all output is held to one" in said
    pairs = json.loads(out.read_text())
    assert len(pairs) == 2
    assert all(0 < pair["masks"] < pair["held"] and 0 < pair["free"] < math.inf for pair in pairs)


def test_pools_of_several_sizes_are_saturated(toy: Callable[[str], Path], tmp_path: Path) -> None:
    trace, out, plot = tmp_path / "trace.json", tmp_path / "out.json", tmp_path / "out.png"
    write_trace([Session((Turn(200, 40, 0.1), Turn(20, 40, 0.1)))], trace)
    config = write_config(
        tmp_path / "pool.yaml",
        model=str(toy("long")),
        dtype="float32",
        shards=1,
        kv_bytes=2 << 20,
        host_bytes=2 << 20,
        router_port=free_port(),
        compression={"policy": "full"},
    )
    load = ["--pools", 4, "--rate", 60, "--seconds", 6, "--trace", trace, "--config", config]
    run(sys.executable, "-m", "bench.pools", *load, "--json", out, "--plot", plot)
    told = json.loads(out.read_text())
    assert [(each["pool"], each["policy"]) for each in told] == [(4, "full"), (4, "pyramid")]
    for each in told:
        assert each["requests_per_second"] > 0
        assert each["pool_used_when_queued"] is None or 0 < each["pool_used_when_queued"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_demo_answers_and_shows_what_that_took(tmp_path: Path) -> None:
    deployment = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    deployment["applications"][0]["args"]["router_port"] = free_port()
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(deployment))
    said = run(PYRAMIDSERVE, "demo", "--config", config)
    assert said.count("you> ") == 3
    assert said.count("KV kept   45.0% of the prompt's") == 2
    spilled = list(map(float, re.findall(r"([\d.]+) MiB spilled", said)))
    assert spilled[2] > 10 > spilled[1]  # `evict` keeps on the host what `prune` never computes
    assert len(re.findall(r"^ +\d+ +█", said, re.MULTILINE)) == 30


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("demo", ".venv/bin/pyramidserve demo --config deploy/serve.yaml"),
        ("humaneval", ".venv/bin/python -m bench.humaneval --out build/humaneval.json"),
        ("serve", ".venv/bin/pyramidserve serve --config deploy/serve.yaml"),
        ("soak", ".venv/bin/pytest -m soak tests/soak"),
    ],
)
def test_make_runs_the_command_that_it_names(target: str, runs: str) -> None:
    assert runs in run("make", "--dry-run", target).splitlines()
