"""Requests through SDK, router and a gang of two shards, on a toy model."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from cluster_process import RunningCluster, eventually
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pyramidserve import (
    AsyncClient,
    ChatMessage,
    Client,
    Compression,
    FinishReason,
    InvalidRequestError,
    PyramidServeError,
    Receipt,
    RequestTimeoutError,
    RequestTooLargeError,
    Sampling,
    Started,
    Stopping,
    Tokens,
    UnknownSessionError,
)
from workers.engine.engine import Engine, EngineRequest

pytest_plugins = ["cluster_fixtures"]

LONG = Stopping(max_tokens=100, ignore_eos=True)
PROMPT = list(range(3, 103))
POLICIES = {
    "full": Compression(),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 40}),
    "prune": Compression("pyramid", "prune", kv_keep=0.7),
    "evict": Compression("pyramid", "evict", kv_keep=0.7),
}


@pytest.fixture
def client(toy_cluster: RunningCluster) -> Iterator[Client]:
    with Client(toy_cluster.target) as client:
        yield client
    toy_cluster.check_empty()


def test_a_mixed_batch_gets_the_tokens_of_the_engine_in_this_process(
    client: Client, toy_engine: Callable[..., Engine]
) -> None:
    requests = [
        (PROMPT[: 20 + 7 * i], Sampling(temperature=(i % 3) / 2, seed=i), compression)
        for i, compression in enumerate([*POLICIES.values()] * 4)
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        replies = list(
            pool.map(
                lambda r: client.generate(r[0], sampling=r[1], stopping=LONG, compression=r[2]), requests
            )
        )
    expected = toy_engine().generate([EngineRequest(p, s, LONG, c) for p, s, c in requests])
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    for reply, same in zip(replies, expected, strict=True):
        assert reply.receipt.layers == same.receipt.layers
        assert reply.receipt.spilled_bytes == same.receipt.spilled_bytes
        assert reply.text == same.text


def test_a_stream_starts_counts_its_tokens_and_ends_in_a_receipt(client: Client) -> None:
    with client.stream("What is a page?", stopping=LONG, compression=POLICIES["evict"]) as stream:
        events = list(stream)
    assert isinstance(events[0], Started)
    assert events[0].prompt_tokens == len("What is a page?")
    receipt = events[-1]
    assert isinstance(receipt, Receipt)
    middle = [event for event in events if isinstance(event, Tokens)]
    assert len(middle) == len(events) - 2
    indices = [event.index + i for event in middle for i in range(len(event.token_ids))]
    assert indices == list(range(100))
    assert receipt.finish_reason is FinishReason.LENGTH
    assert receipt.queue_time >= 0
    assert receipt.time_to_first_token > 0
    assert receipt.pipeline_id


def test_a_session_goes_on_with_what_it_left_and_recalls_it(
    client: Client, toy_engine: Callable[..., Engine], toy_cluster: RunningCluster
) -> None:
    stopping = Stopping(max_tokens=12, ignore_eos=True)
    for compression in (
        Compression("pyramid", "evict", kv_keep=0.7, recall="exact"),
        Compression("pyramid", "evict", kv_keep=0.7, recall="step"),
        Compression("pyramid", "prune", kv_keep=0.7, recall="turn"),
        Compression(),
    ):
        messages = [ChatMessage("user", "What is a page? " * 4)]
        left = 0
        for turn in range(3):
            reply = client.chat(messages, session_id="s", stopping=stopping, compression=compression)
            receipt = reply.receipt
            assert receipt.reused_tokens == left
            assert receipt.recall == compression.recall
            if compression.recall in ("off", "exact"):
                full = client.chat(messages, stopping=stopping, compression=Compression())
                assert turn > 0 or reply.token_ids == full.token_ids
            left = receipt.prompt_tokens + receipt.output_tokens - 1
            messages += [ChatMessage("assistant", reply.text), ChatMessage("user", "And then?")]
        if compression.recall != "off":
            assert receipt.recalled_bytes > 0
        assert client.end_session("s") == 3
    eventually(
        lambda: not any(stage.pages_in_use for stage in toy_cluster.state().pipelines[0].stages),
        "the ended sessions still hold pages",
    )


def test_what_floors_keep_of_a_chat_is_what_one_process_keeps(
    client: Client, toy_engine: Callable[..., Engine]
) -> None:
    messages = [
        ChatMessage("system", "Answer in verse, always."),
        ChatMessage("user", "What is a page? " * 4),
    ]
    plain, floored = (
        Compression("tova", kv_keep=0.3, parameters={"span_floor": floor}) for floor in (0, 0.9)
    )
    replies = [client.chat(messages, stopping=LONG, compression=each) for each in (plain, floored)]
    requests = [EngineRequest(messages, stopping=LONG, compression=each) for each in (plain, floored)]
    expected = toy_engine().generate(requests)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    assert replies[0].token_ids != replies[1].token_ids


def test_device_pages_fall_as_host_bytes_rise(client: Client, toy_cluster: RunningCluster) -> None:
    def peak(compression: Compression) -> Receipt:
        return client.generate(PROMPT, stopping=LONG, compression=compression).receipt

    full, evicted = peak(POLICIES["full"]), peak(POLICIES["evict"])
    assert full.spilled_bytes == 0
    assert evicted.spilled_bytes > 0
    assert evicted.peak_device_bytes.kv < full.peak_device_bytes.kv
    row = toy_cluster.state().pipelines[0].stages[0].page_bytes // 16
    assert evicted.spilled_bytes == sum(layer.spilled for layer in evicted.layers) * row


def test_chat_goes_through_the_template_and_a_session_counts_its_turns(client: Client) -> None:
    messages = [ChatMessage("user", "hello")]
    for _ in range(2):
        reply = client.chat(messages, session_id="s-1", stopping=Stopping(max_tokens=4))
        assert reply.receipt.prompt_tokens == len("user: hello\nassistant: ")
    assert client.end_session("s-1") == 2
    with pytest.raises(UnknownSessionError, match="s-1"):
        client.end_session("s-1")


def test_a_stream_that_was_cut_is_resumed_where_it_stopped(client: Client) -> None:
    sampling = Sampling(temperature=0.9, seed=11)
    for compression in POLICIES.values():
        whole = client.generate(PROMPT, sampling=sampling, stopping=LONG, compression=compression)
        rest = client.generate(
            PROMPT,
            sampling=sampling,
            stopping=LONG,
            compression=compression,
            resume_output_ids=whole.token_ids[:37],
        )
        assert rest.token_ids == whole.token_ids[37:]
        assert rest.receipt.output_tokens == 100
        nothing = client.generate(
            PROMPT, sampling=sampling, stopping=LONG, resume_output_ids=whole.token_ids
        )
        assert nothing.token_ids == ()


def test_a_request_id_that_is_live_is_joined_and_runs_once(
    client: Client, toy_cluster: RunningCluster
) -> None:
    before = toy_cluster.state().decisions.get("admitted", 0)
    with client.stream(PROMPT, stopping=LONG, request_id="twin") as first:
        for event in first:
            if isinstance(event, Tokens):
                break
        second = client.generate(PROMPT, stopping=LONG, request_id="twin")
        others = [event for event in first if isinstance(event, Tokens)]
    assert second.token_ids[-1] == others[-1].token_ids[-1]
    assert len(second.token_ids) == 100
    assert toy_cluster.state().decisions["admitted"] == before + 1


def test_the_log_has_a_request_from_the_queue_to_its_end(
    client: Client, toy_cluster: RunningCluster
) -> None:
    # Not those of a cluster of before, whose logs are there too.
    name, left = f"a-life-in-the-log-{uuid4()}", f"left-in-the-log-{uuid4()}"
    receipt = client.generate(PROMPT, stopping=LONG, request_id=name).receipt
    with client.stream(PROMPT, stopping=LONG, request_id=left) as stream:
        next(iter(stream))

    def shown(request_id: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in toy_cluster.lines if line.startswith("{")]
        return [event for event in events if event.get("request_id") == request_id]

    eventually(lambda: len(shown(name)) == 5, "the terminal does not have five events of the request")
    eventually(
        lambda: any(event["event"] == "request_cancelled" for event in shown(left)),
        "the terminal does not have the end of the request whose client has left",
    )
    files = Path("/tmp/ray").glob("session_*/logs/serve/*.events.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines() if name in line]
    written = {event["event"]: event for event in map(json.loads, lines)}
    assert [written[event["event"]] for event in shown(name)] == shown(name)
    assert {event["pipeline"] for event in written.values() if "pipeline" in event} == {receipt.pipeline_id}
    assert written["request_admitted"]["sequence"] == written["sequence_ordered"]["sequence"]
    assert written["sequence_ordered"]["rank"] == 0
    end = written["request_finished"]
    assert (end["reason"], end["output_tokens"]) == ("length", 100)
    assert end["time_to_first_token"] == receipt.time_to_first_token
    assert sorted(written) == [
        "request_admitted", "request_finished", "request_first_token", "request_queued", "sequence_ordered",
    ]  # fmt: skip
    ready = {json.loads(line).get("rank") for line in toy_cluster.lines if '"shard_ready"' in line}
    assert ready == {0, 1}


def test_a_good_start_says_what_fits(toy_cluster: RunningCluster) -> None:
    stages = toy_cluster.state().pipelines[0].stages
    # A sequence of the whole context has 16 pages of each layer.
    fits = min(stage.pages_total // (16 * (stage.end_layer - stage.first_layer)) for stage in stages)
    assert 1 < fits < 16
    first = "6 layers, context 256, vocabulary 259, float32 with KV in float32 on cpu kernels; "
    room = f"{fits} sequences of 256 tokens with `full`"
    # Where one was lost before, there are lines of two that are alike.
    said = [line for line in toy_cluster.lines if line.startswith("· pipeline ")]
    assert said
    assert {line[line.index("6 layers") :] for line in said} == {f"{first}room for {room}\n"}
    told = next(json.loads(line) for line in toy_cluster.lines if '"pipeline_ready"' in line)
    assert told["fits"] == room
    assert (told["layers"], told["context"], told["vocabulary"]) == (6, 256, 259)
    assert (told["dtype"], told["backend"]) == ("float32", "cpu")


def test_health_is_served(toy_cluster: RunningCluster) -> None:
    with grpc.insecure_channel(toy_cluster.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "pyramidserve.v1.Inference"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


BAD_INPUTS: list[tuple[dict[str, Any], type[PyramidServeError], str]] = [
    ({"prompt": ""}, InvalidRequestError, "empty"),
    ({"prompt": list[int]()}, InvalidRequestError, "empty"),
    ({"prompt": [5] * 256}, InvalidRequestError, "256"),
    ({"prompt": [5, 259]}, InvalidRequestError, "259"),
    ({"prompt": [5, -1]}, InvalidRequestError, "-1"),
    ({"stopping": Stopping(max_tokens=0)}, InvalidRequestError, "max_tokens is 0"),
    ({"stopping": Stopping(max_tokens=-4)}, InvalidRequestError, "-4"),
    ({"stopping": Stopping(max_tokens=4000)}, InvalidRequestError, "room for 156"),
    ({"sampling": Sampling(temperature=float("nan"))}, InvalidRequestError, "temperature is nan"),
    ({"sampling": Sampling(temperature=-0.1)}, InvalidRequestError, "temperature is -0.1"),
    ({"sampling": Sampling(top_p=0.0)}, InvalidRequestError, "top_p is 0"),
    ({"sampling": Sampling(top_p=1.5)}, InvalidRequestError, "top_p is 1.5"),
    ({"sampling": Sampling(top_k=0)}, InvalidRequestError, "top_k is 0"),
    ({"compression": Compression("magic")}, InvalidRequestError, "'magic'"),
    ({"compression": Compression("pyramid", "melt")}, InvalidRequestError, "'melt'"),
    ({"compression": Compression("pyramid", kv_keep=0.0)}, InvalidRequestError, "kv_keep is 0"),
    ({"compression": Compression("pyramid", kv_keep=1.2)}, InvalidRequestError, "kv_keep is 1.2"),
    ({"prompt": "x" * (9 << 20)}, InvalidRequestError, "bytes"),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), BAD_INPUTS, ids=[words for _, _, words in BAD_INPUTS]
)
def test_bad_input_is_named_and_harms_nothing(
    client: Client, changes: dict[str, Any], error: type[PyramidServeError], words: str
) -> None:
    arguments: dict[str, Any] = {"prompt": PROMPT, "stopping": Stopping(max_tokens=4)} | changes
    with pytest.raises(error) as raised:
        client.generate(**arguments)
    assert words in raised.value.message
    assert raised.value.retry_delay is None
    assert len(client.generate(PROMPT, stopping=Stopping(4, ignore_eos=True)).token_ids) == 4


def test_a_request_that_no_pipeline_could_hold_is_refused_at_once(
    client: Client, tiny_pool: RunningCluster
) -> None:
    with Client(tiny_pool.target) as tiny:
        with pytest.raises(RequestTooLargeError, match=r"pages.*lower max_tokens"):
            tiny.generate(PROMPT, stopping=LONG)
        # One that fits goes through, though it must wait for another.
        with ThreadPoolExecutor(4) as pool:
            short = Stopping(max_tokens=8, ignore_eos=True)
            replies = list(pool.map(lambda _: tiny.generate(PROMPT[:20], stopping=short), range(4)))
    assert {reply.token_ids for reply in replies} == {replies[0].token_ids}
    tiny_pool.check_empty()


def test_a_deadline_ends_the_request_everywhere(client: Client) -> None:
    with pytest.raises(RequestTimeoutError):
        client.generate(PROMPT, stopping=Stopping(150, ignore_eos=True), timeout=0.05)


def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(toy_cluster: RunningCluster) -> None:
    moments = random.Random(7)

    async def leave(client: AsyncClient, number: int) -> int:
        """Leaves after so many events, or at some moment before the first."""
        events = -2 if number % 10 == 0 else moments.randrange(60)
        compression = list(POLICIES.values())[number % 4]
        seen = 0
        stream = client.stream(PROMPT, stopping=LONG, compression=compression)
        async with stream:
            if events == -2:
                return 0
            async for _ in stream:
                seen += 1
                if seen > events:
                    break
        return seen

    async def crowd() -> list[int]:
        async with AsyncClient(toy_cluster.target) as client:
            return await asyncio.gather(*(leave(client, number) for number in range(60)))

    async def cancelled_tasks() -> int:
        """Tasks cancelled from outside, at growing distances in time."""
        cancelled = 0
        async with AsyncClient(toy_cluster.target) as client:
            for number in range(40):
                task = asyncio.ensure_future(client.generate(PROMPT, stopping=LONG))
                try:
                    await asyncio.wait_for(task, timeout=moments.random() / 4)
                except TimeoutError:
                    cancelled += 1
                assert number < 40
        return cancelled

    seen = asyncio.run(crowd())
    assert len(seen) == 60
    assert min(seen) == 0 < max(seen)
    assert asyncio.run(cancelled_tasks()) > 0
    toy_cluster.check_empty()
    eventually(lambda: toy_cluster.state().sessions == 0, "sessions are left")
