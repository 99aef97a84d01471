"""The embedded model on a cluster of two shards."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from cluster_process import RunningCluster, free_port, running_cluster
from safetensors import safe_open

from pyramidserve import ChatMessage, Client, Compression, StageState, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest

LAYERS = 30
ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Iterator[RunningCluster]:
    folder, port = tmp_path_factory.mktemp("embedded-cluster"), free_port()
    with running_cluster(folder, dtype="float32", shards=2, http_port=port) as cluster:
        yield cluster


def test_each_shard_loads_its_own_layers_alone(cluster: RunningCluster) -> None:
    first, last = cluster.state().pipelines[0].stages
    assert (first.first_layer, first.end_layer, last.end_layer) == (0, last.first_layer, LAYERS)
    for stage in (first, last):
        layers = {int(name.split(".")[2]) for name in stage.tensor_names if ".layers." in name}
        assert layers == set(range(stage.first_layer, stage.end_layer))
    assert "model.norm.weight" not in first.tensor_names
    assert "model.norm.weight" in last.tensor_names
    assert first.pid != last.pid


def test_each_process_is_smaller_by_the_layers_that_it_does_not_hold(
    cluster: RunningCluster, embedded: Path, tmp_path: Path
) -> None:
    sizes: dict[str, int] = {}
    for part in embedded.glob("*.safetensors"):
        with safe_open(part, "pt") as tensors:
            sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    with running_cluster(tmp_path, dtype="float32", shards=1) as alone:
        (whole,) = _stages_after_a_token(alone)
    assert set(whole.tensor_names) == set(sizes)
    for stage in _stages_after_a_token(cluster):
        missing = sum(sizes.values()) - sum(sizes[name] for name in stage.tensor_names)
        assert missing > 200 << 20
        # Rank 1 is smaller still: the head alone has a tokenizer.
        assert whole.resident_bytes - stage.resident_bytes >= 0.9 * missing


def _stages_after_a_token(cluster: RunningCluster) -> tuple[StageState, ...]:
    with Client(cluster.target) as client:
        client.generate([1, 2, 3], stopping=Stopping(max_tokens=1))
        return client.cluster_state().pipelines[0].stages


def test_answers_are_those_of_the_engine_in_this_process(cluster: RunningCluster, embedded: Path) -> None:
    engine = Engine(EngineConfig(str(embedded), dtype="float32"))
    document = topics["execmodel"][:4800]  # `make demo` has all of it, which takes twice as long
    questions = ["Why is the sky blue?", f"{document}\n\nWhat is a block?"]
    policies = [
        Compression(),
        Compression("pyramid", "prune", kv_keep=0.45),
        Compression("pyramid", "evict", kv_keep=0.45),
    ]
    stopping = Stopping(max_tokens=24)
    with Client(cluster.target) as client:
        for question in questions:
            messages = [ChatMessage("user", question)]
            for compression in policies:
                reply = client.chat(messages, stopping=stopping, compression=compression)
                (same,) = engine.generate(
                    [EngineRequest(messages, stopping=stopping, compression=compression)]
                )
                assert reply.text == same.text
                assert reply.receipt.layers == same.receipt.layers
                if question is questions[1] and compression.kv_keep:
                    assert reply.receipt.prompt_tokens > 1024
                    assert reply.receipt.kv_keep_reached == pytest.approx(0.45, abs=0.01)
    cluster.check_empty()


def test_problems_of_humaneval_are_answered_in_every_setting(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.humaneval", "--url", cluster.http, "--out", str(out)]
    command += ["--problems", "2", "--max-tokens", "6"]
    said = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True) for _ in range(2)]
    assert "the authors' own solutions pass in the sandbox, 2 of 2" in said[0].stderr
    assert "evict-exact: 2 of 2 problems are to be answered" in said[0].stderr
    assert "evict-exact: 0 of 2 problems are to be answered" in said[1].stderr
    assert said[0].stdout == said[1].stdout
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["full", "prune", "evict", "evict-turn", "evict-exact"]
    for name, told in results.items():
        assert 1 < told["output_tokens"] <= 6
        assert (told["kv_keep_reached"] == 1) == (name == "full")
        assert (told["recalled_bytes"] > 0) == (name == "evict-turn")
    assert results["evict-exact"]["identical"] == 1
    cluster.check_empty()


@pytest.mark.parametrize("document", ["README.md", "docs/http.md"])
def test_the_programs_of_the_documents_run(
    document: str, cluster: RunningCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = PROGRAM.findall((ROOT / document).read_text())
    assert len(programs) >= 2
    for program in programs:
        own = program.replace("127.0.0.1:8700", cluster.target)
        exec(own.replace("http://127.0.0.1:8701", cluster.http), {})
        assert capsys.readouterr().out.strip()
