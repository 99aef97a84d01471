"""What the blocking client makes of a scripted server's answers."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest
from scripted_inference import STATE, ScriptedInference, hold, receipt, refuse, serving

from pyramidserve import (
    Client,
    EngineError,
    Event,
    InvalidRequestError,
    OverloadedError,
    PyramidServeError,
    Receipt,
    Reply,
    RequestCancelledError,
    RequestConflictError,
    RequestTimeoutError,
    RequestTooLargeError,
    Started,
    Tokens,
    UnavailableError,
    UnknownSessionError,
)
from pyramidserve.v1 import inference_pb2 as pb

pytest_plugins = ["scripted_fixtures"]

PATIENCE = 60  # seconds that anything may take before the test fails


def test_a_stream_brings_the_events_in_order(client: Client) -> None:
    stream = client.stream("two words", request_id="r")
    assert list(stream) == [
        Started(2, 7),
        Tokens(0, (100,), "two"),
        Tokens(1, (101,), " words"),
        receipt("r", 2),
    ]
    assert list(stream) == []


def test_several_streams_run_at_once(client: Client, scripted: ScriptedInference) -> None:
    together = threading.Barrier(3)

    def meet(request: pb.GenerateRequest, context: object) -> Iterator[Event]:
        together.wait(PATIENCE)
        yield Tokens(0, (1,), request.request_id)
        yield receipt(request.request_id, 1)

    scripted.script = meet
    streams = client.streams("word", 3, request_id="r")
    assert [stream.request_id for stream in streams] == ["r-0", "r-1", "r-2"]
    assert [next(stream) for stream in streams] == [Tokens(0, (1,), f"r-{each}") for each in range(3)]


def test_of_several_replies_none_is_left_where_one_is_refused(
    client: Client, scripted: ScriptedInference
) -> None:
    begun, left = threading.Event(), threading.Event()

    def refuse_the_first(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        if request.request_id == "r-0":
            begun.wait(PATIENCE)
            yield from refuse(OverloadedError("full"))(request, context)
        begun.set()
        context.add_callback(left.set)
        yield from hold(request, context)

    scripted.script = refuse_the_first
    with pytest.raises(OverloadedError, match="full"):
        client.replies("word", 2, request_id="r")
    assert left.wait(PATIENCE)


def test_generate_joins_what_the_stream_brings(client: Client) -> None:
    assert client.generate("two words", request_id="r") == Reply("two words", (100, 101), receipt("r", 2))


def test_closing_a_stream_cancels_the_request(client: Client, scripted: ScriptedInference) -> None:
    scripted.script = hold
    with client.stream("word") as stream:
        assert next(stream) == Started(1, 7)
        assert not scripted.ended.is_set()
    assert scripted.ended.wait(PATIENCE)
    assert list(stream) == []


def test_closing_a_stream_ends_the_iteration_in_another_thread(
    client: Client, scripted: ScriptedInference
) -> None:
    scripted.script = hold
    stream = client.stream("word")
    events: list[Event] = []
    held = threading.Event()

    def listen() -> None:
        for event in stream:
            events.append(event)
            if isinstance(event, Tokens):
                held.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert held.wait(PATIENCE)
    stream.close()
    listener.join(PATIENCE)
    assert not listener.is_alive()
    assert events == [Started(1, 7), Tokens(0, (100,), "held")]


def test_closing_the_client_cancels_what_runs(scripted_target: str, scripted: ScriptedInference) -> None:
    scripted.script = hold
    client = Client(scripted_target)
    stream = client.stream("word")
    next(stream)
    client.close()
    with pytest.raises(RequestCancelledError):
        list(stream)
    assert scripted.ended.wait(PATIENCE)


@pytest.mark.parametrize(("own", "call"), [(0.2, None), (None, 0.2), (PATIENCE, 0.2)])
def test_the_timeout_ends_a_reply(
    scripted_target: str, scripted: ScriptedInference, own: float | None, call: float | None
) -> None:
    scripted.script = hold
    with (
        Client(scripted_target, timeout=own) as client,
        pytest.raises(RequestTimeoutError, match=scripted_target),
    ):
        client.generate("word", timeout=call)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("top_p is 2", reason="top_p"),
        RequestTooLargeError("9000 pages never fit"),
        RequestConflictError("r runs with another prompt"),
        OverloadedError("64 requests wait", retry_delay=2.5),
        UnavailableError("no pipeline is attached", retry_delay=5.0),
        EngineError("the engine failed"),
    ],
)
def test_refusals_arrive_as_they_were_raised(
    client: Client, scripted: ScriptedInference, error: PyramidServeError
) -> None:
    scripted.script = refuse(error)
    with pytest.raises(type(error)) as caught:
        client.generate("word")
    assert type(caught.value) is type(error)
    assert vars(caught.value) == vars(error)


def test_a_reply_without_a_receipt_is_an_error(client: Client, scripted: ScriptedInference) -> None:
    def cut(request: pb.GenerateRequest, context: object) -> Iterator[Event]:
        yield Started(1, 7)

    scripted.script = cut
    with pytest.raises(EngineError, match="receipt"):
        client.generate("word")


def test_a_bug_in_the_server_is_an_engine_error(client: Client, scripted: ScriptedInference) -> None:
    def broken(request: pb.GenerateRequest, context: object) -> Iterator[Event]:
        raise ZeroDivisionError

    scripted.script = broken
    with pytest.raises(EngineError, match="Exception calling application"):
        client.generate("word")


def test_where_nobody_listens_the_target_is_named(deaf_target: str) -> None:
    with Client(deaf_target) as client:
        for call in (lambda: client.generate("word"), client.cluster_state):
            with pytest.raises(UnavailableError, match=deaf_target) as caught:
                call()
            assert caught.value.retry_delay == 1.0


def test_a_server_that_goes_during_a_reply_is_unavailable(scripted: ScriptedInference) -> None:
    scripted.script = hold
    with ExitStack() as server:
        target = server.enter_context(serving(scripted))
        with Client(target, resume_seconds=0) as client:
            stream = client.stream("word")
            assert [next(stream), next(stream)] == [Started(1, 7), Tokens(0, (100,), "held")]
            server.close()
            with pytest.raises(UnavailableError, match=target):
                next(stream)


def test_sessions_end_once(client: Client) -> None:
    client.generate("one", session_id="s")
    client.generate("two", session_id="s")
    assert client.end_session("s") == 2
    with pytest.raises(UnknownSessionError, match="'s'"):
        client.end_session("s")


def test_the_state_of_the_cluster_arrives(client: Client) -> None:
    assert client.cluster_state() == STATE


def test_one_client_serves_many_threads(client: Client, scripted: ScriptedInference) -> None:
    together = threading.Barrier(3)

    def meet(request: pb.GenerateRequest, context: object) -> Iterator[Event]:
        together.wait(PATIENCE)
        yield Tokens(0, (1,), request.text)
        yield receipt(request.request_id, 1)

    scripted.script = meet
    with ThreadPoolExecutor(3) as threads:
        replies = threads.map(client.generate, ("a", "b", "c"))
        assert [reply.text for reply in replies] == ["a", "b", "c"]


def test_a_reply_goes_on_where_it_was_when_the_server_is_lost(
    client: Client, scripted: ScriptedInference
) -> None:
    lost = UnavailableError("the router has shut down", retry_delay=0.0)

    def cut(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        done = len(request.resume_output_ids)
        yield Started(1, 7)
        if done < 4:
            yield Tokens(done, (done, done + 1), f" {done} {done + 1}")
            yield from refuse(lost)(request, context)
        yield receipt(request.request_id, done)

    scripted.script = cut
    events = list(client.stream("word", session_id="s"))
    assert events[:-1] == [Started(1, 7), Tokens(0, (0, 1), " 0 1"), Tokens(2, (2, 3), " 2 3")]
    assert isinstance(events[-1], Receipt)
    asked = scripted.requests
    assert [list(each.resume_output_ids) for each in asked] == [[], [0, 1], [0, 1, 2, 3]]
    assert {each.request_id for each in asked} == {asked[0].request_id}
    assert [each.sampling.seed for each in asked[1:]] == [7, 7]


def test_a_lost_server_is_waited_for_no_longer_than_asked(scripted: ScriptedInference) -> None:
    def cut(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        yield Started(1, 7)
        yield from refuse(UnavailableError("gone", retry_delay=0.02))(request, context)

    scripted.script = cut
    with (
        serving(scripted) as target,
        Client(target, resume_seconds=0.01) as client,
        pytest.raises(UnavailableError, match="gone"),
    ):
        client.generate("word")
    assert len(scripted.requests) == 1
