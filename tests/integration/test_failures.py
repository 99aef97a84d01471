"""What happens when a shard dies, and when a cluster cannot come up."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster_process import RunningCluster, free_port, run_serve, write_config
from transformers import GPT2Config

from pyramidserve import Client, Receipt, Sampling, Stopping, Tokens

pytest_plugins = ["cluster_fixtures"]

LONG = Stopping(max_tokens=150, ignore_eos=True)
PROMPT = list(range(3, 103))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_outlives_a_killed_shard(toy_cluster: RunningCluster, rank: int) -> None:
    before = toy_cluster.state()
    pipeline = before.pipelines[0]
    sampling = Sampling(temperature=0.8, seed=3)
    chunks: list[Tokens] = []
    with Client(toy_cluster.target) as client:
        whole = client.generate(PROMPT, sampling=sampling, stopping=LONG)
        with client.stream(PROMPT, sampling=sampling, stopping=LONG) as stream:
            while sum(len(chunk.token_ids) for chunk in chunks) < 5:
                event = next(stream)
                chunks += [event] if isinstance(event, Tokens) else []
            os.kill(pipeline.stages[rank].pid, signal.SIGKILL)
            *rest, receipt = stream
            chunks += [event for event in rest if isinstance(event, Tokens)]
    assert isinstance(receipt, Receipt)
    assert receipt.pipeline_id != pipeline.pipeline_id
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    replayed = [state.decisions.get("replayed", 0) for state in (before, toy_cluster.state())]
    assert replayed[1] == replayed[0] + 1
    toy_cluster.check_empty()


def _refusal(folder: Path, **settings: object) -> str:
    """What `pyramidserve serve` says before it gives up."""
    process = run_serve(folder, write_config(folder / "serve.yaml", **settings))
    try:
        _, said = process.communicate(timeout=120)
    except BaseException:
        process.kill()
        raise
    assert process.returncode == 1, said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    return error


def _begun(folder: Path, toy: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A `serve` that waits for its shards, and all processes that it has started."""
    process = run_serve(
        folder, write_config(folder / "serve.yaml", model=str(toy), router_port=free_port())
    )
    assert process.stderr is not None
    while "deploying" not in (line := process.stderr.readline()):
        assert line, "it has ended"
    started = psutil.Process(process.pid).children(recursive=True)
    assert "raylet" in {each.name() for each in started}
    return process, started


def _gone(started: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(started, timeout=seconds)[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_serve_that_is_ended_while_it_starts_leaves_nothing(
    tmp_path: Path, toy: Callable[[str], Path], number: signal.Signals, code: int
) -> None:
    process, started = _begun(tmp_path, toy("gqa"))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert _gone(started, 10.0)


def test_a_gang_that_cannot_be_scheduled_names_the_resource(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    said = _refusal(tmp_path, model=str(toy("gqa")), router_port=free_port(), cpus_per_shard=1000)
    assert "2000 CPU" in said


def test_a_port_in_use_is_named(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = _refusal(tmp_path, model=str(toy("gqa")), router_port=port)
    assert f"127.0.0.1:{port}" in said
    assert "router_port" in said


def test_more_shards_than_layers_are_refused(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    said = _refusal(tmp_path, model=str(toy("gqa")), router_port=free_port(), shards=7, cpus_per_shard=0.1)
    assert "shards is 7" in said


def test_a_pool_that_this_machine_has_no_memory_for_is_named(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    said = _refusal(tmp_path, model=str(toy("gqa")), router_port=free_port(), kv_bytes=100 << 30)
    assert "lower kv_bytes" in said


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    assert "/nowhere/at-all" in _refusal(tmp_path, model="/nowhere/at-all")


def test_a_truncated_checkpoint_is_named(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy("gqa"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    said = _refusal(tmp_path, model=str(broken))
    assert str(broken) in said
    assert "cannot be read" in said


def test_a_checkpoint_of_another_architecture_is_named(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "'gpt2'" in _refusal(tmp_path, model=str(tmp_path / "gpt2"))
