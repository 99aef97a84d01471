"""OpenAI's own client and plain HTTP against a gang of two shards, on a toy model."""

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from cluster_process import RunningCluster, eventually
from openai import OpenAI
from pydantic import BaseModel, Field

from pyramidserve import ChatMessage, Client, Compression, Sampling, Stopping
from workers.engine.engine import Engine, EngineRequest

pytest_plugins = ["cluster_fixtures"]

HI = [{"role": "user", "content": "What is a page?"}]


@pytest.fixture
def client(toy_cluster: RunningCluster) -> Iterator[Any]:
    with OpenAI(base_url=f"{toy_cluster.http}/v1", api_key="any", max_retries=0) as client:
        yield client
    toy_cluster.check_empty()


def end_session(cluster: RunningCluster, name: str) -> int:
    """Ends a session, as others count what is left; returns its turns."""
    ended = httpx2.delete(f"{cluster.http}/v1/sessions/{name}", trust_env=False)
    turns: int = ended.json()["turns"]
    return turns


def test_it_says_what_the_sdk_is_told(client: Any, toy_cluster: RunningCluster) -> None:
    with Client(toy_cluster.target) as sdk:
        for temperature in (0.0, 1.0):
            sampling, stopping = Sampling(temperature, seed=5), Stopping(max_tokens=24)
            expected = sdk.chat(
                [ChatMessage("user", "What is a page?")],
                sampling=sampling,
                stopping=stopping,
                session_id="s",
            )
            asked: dict[str, Any] = {"model": "toy", "messages": HI, "max_tokens": 24, "seed": 5}
            asked |= {"temperature": temperature, "extra_body": {"session_id": "t"}}
            reply = client.chat.completions.create(**asked)
            assert reply.choices[0].message.content == expected.text
            asked["extra_body"] = {"session_id": "u"}
            with client.chat.completions.create(**asked, stream=True) as stream:
                parts = [each.choices[0].delta.content or "" for each in stream if each.choices]
            assert "".join(parts) == expected.text
            for session in "stu":
                sdk.end_session(session)


def test_log_probabilities_are_those_of_the_engine(client: Any, toy_engine: Callable[..., Engine]) -> None:
    """As `lm-eval` asks for them, and behind a compressed prompt."""
    engine, ids = toy_engine(), [3 + 7 * i % 250 for i in range(90)]
    asked: dict[str, Any] = {"model": "toy", "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True}
    for split, compression in ((1, None), (60, Compression("pyramid", "evict", kv_keep=0.7))):
        extra = {}
        if compression:
            said = {"policy": "pyramid", "prefill": "evict", "kv_keep": 0.7}
            extra = {"score_from": split, "compression": said}
        told = client.completions.create(**asked, extra_body=extra).choices[0].logprobs
        (scored,) = engine.generate(
            [
                EngineRequest(
                    ids[:split],
                    Sampling(logprobs=1),
                    Stopping(max_tokens=len(ids) - split + 1),
                    compression or Compression(),
                    given_output_ids=tuple(ids[split:]),
                )
            ]
        )
        assert len(told.tokens) == len(ids) + 1
        assert told.token_logprobs[:split] == [None] * split
        assert told.token_logprobs[split:] == pytest.approx([each.logprob for each in scored.logprobs])
        for logprob, top in zip(told.token_logprobs[split:], told.top_logprobs[split:], strict=True):
            assert logprob in top.values()


def test_a_history_that_is_sent_again_is_not_computed_again(
    client: Any, toy_cluster: RunningCluster
) -> None:
    messages, cached = list(HI), []
    for question in ("And a table?", "Thanks", ""):
        reply = client.chat.completions.create(model="toy", messages=messages, max_tokens=8)
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
        messages += [
            {"role": "assistant", "content": reply.choices[0].message.content},
            {"role": "user", "content": question},
        ]
    assert cached[0] == 0
    assert 0 < cached[1] < cached[2]
    session = reply.model_extra["pyramidserve"]["session_id"]
    assert end_session(toy_cluster, session) == 3


def test_what_chunks_say_of_the_device_is_what_the_receipt_says_at_the_end(
    client: Any, toy_cluster: RunningCluster
) -> None:
    stream = client.completions.create(
        model="toy",
        prompt="A page is 16 tokens of one layer. " * 5,
        max_tokens=60,
        logprobs=0,
        stream=True,
        stream_options={"continuous_kv_tokens": True},
        extra_body={"compression": {"policy": "pyramid", "prefill": "evict", "kv_keep": 0.5}},
    )
    *chunks, last = stream
    told = [chunk.choices[0].model_extra["kv_tokens"] for chunk in chunks if chunk.choices[0].logprobs]
    receipt = last.model_extra["pyramidserve"]
    layers, output = receipt["layers"], receipt["output_tokens"]
    assert told[-1] == {
        "all": receipt["prompt_tokens"] + output - 1,
        "device": [layer["prompt_kept"] + layer["generated_kept"] for layer in layers],
    }
    assert len({each["all"] for each in told}) > 5
    assert sum(told[0]["device"]) < len(layers) * told[0]["all"]


def test_many_at_once(client: Any) -> None:
    def ask(number: int) -> str:
        reply = client.completions.create(model="toy", prompt=f"number {number}", max_tokens=30)
        text: str = reply.choices[0].text
        return text

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_what_cannot_be_is_refused_by_name(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is 100000"):
        client.completions.create(model="toy", prompt="x", max_tokens=100_000)
    with pytest.raises(openai.NotFoundError, match="'gpt-9'"):
        client.completions.create(model="gpt-9", prompt="x")


def test_curl(toy_cluster: RunningCluster) -> None:
    asked = '{"messages":[{"role":"user","content":"Hi"}],"max_tokens":4,"stream":true,"session_id":"curl"}'
    command = ["curl", "-sN", f"{toy_cluster.http}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", asked]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith('data: {"id": "chatcmpl-')
    assert said.endswith("data: [DONE]\n\n")
    assert end_session(toy_cluster, "curl") == 1


def test_a_client_that_goes_leaves_nothing(client: Any, toy_cluster: RunningCluster) -> None:
    stream = client.completions.create(model="toy", prompt="x", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    eventually(lambda: not toy_cluster.state().running, "the request of a client that has gone runs on")


def test_replies_are_what_they_are_held_to(client: Any, toy_cluster: RunningCluster) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 99}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    asked: dict[str, Any] = {"model": "toy", "messages": HI, "max_tokens": 100}
    session = {"extra_body": {"session_id": "held"}}
    reply = client.chat.completions.create(**asked, response_format=named, **session)
    assert json.loads(reply.choices[0].message.content).keys() == {"ok", "n"}
    outputs = {"structured_outputs": {"choice": ["yes.", "no (maybe)"]}, "session_id": "held"}
    chosen = client.chat.completions.create(**asked, extra_body=outputs)
    assert chosen.choices[0].message.content in ("yes.", "no (maybe)")
    assert chosen.choices[0].finish_reason == "stop"
    wrong = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "objct"}}}
    with pytest.raises(openai.BadRequestError, match="objct"):
        client.chat.completions.create(**asked, response_format=wrong)
    said = client.responses.create(
        model="toy",
        input="Hi",
        max_output_tokens=100,
        text={"format": {"type": "json_schema", "name": "answer", "schema": schema}},
        extra_body={"session_id": "held"},
    )
    assert json.loads(said.output_text).keys() == {"ok", "n"}
    assert end_session(toy_cluster, "held") == 3


def test_a_schema_of_pydantic(client: Any, toy_cluster: RunningCluster) -> None:
    class Fruit(BaseModel):
        name: str = Field(max_length=5)
        ripe: bool

    reply = client.chat.completions.parse(
        model="toy", messages=HI, max_tokens=200, response_format=Fruit, extra_body={"session_id": "held"}
    )
    assert isinstance(reply.choices[0].message.parsed, Fruit)
    assert end_session(toy_cluster, "held") == 1
