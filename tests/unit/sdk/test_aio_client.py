"""The asyncio client against a scripted server."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from scripted_inference import STATE, ScriptedInference, hold, receipt, refuse

from pyramidserve import (
    AsyncClient,
    AsyncReplyStream,
    ChatMessage,
    Event,
    InvalidRequestError,
    OverloadedError,
    Reply,
    RequestCancelledError,
    RequestTimeoutError,
    Sampling,
    Started,
    Tokens,
    UnavailableError,
    UnknownSessionError,
)

pytest_plugins = ["scripted_fixtures"]

PATIENCE = 60  # seconds that anything may take before the test fails

Result = TypeVar("Result")


def with_client(target: str, use: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
    """What ``use`` makes of a client of ``target``, in an event loop of its own."""

    async def scenario() -> Result:
        async with AsyncClient(target) as client:
            return await use(client)

    return asyncio.run(scenario())


async def listening(stream: AsyncReplyStream, events: list[Event]) -> asyncio.Task[None]:
    """A task that collects ``events``, once it has the first text."""
    held = asyncio.Event()

    async def listen() -> None:
        async for event in stream:
            events.append(event)
            if isinstance(event, Tokens):
                held.set()

    task = asyncio.create_task(listen())
    await asyncio.wait_for(held.wait(), PATIENCE)
    return task


def test_a_stream_brings_the_events_in_order(scripted_target: str) -> None:
    async def use(client: AsyncClient) -> list[Event]:
        stream = client.stream("two words", request_id="r")
        events = [event async for event in stream]
        return events + [event async for event in stream]

    assert with_client(scripted_target, use) == [
        Started(2, 7),
        Tokens(0, (100,), "two"),
        Tokens(1, (101,), " words"),
        receipt("r", 2),
    ]


def test_replies_run_together(scripted_target: str, scripted: ScriptedInference) -> None:
    async def use(client: AsyncClient) -> list[Reply]:
        replies = await asyncio.gather(
            client.generate("two words", request_id="a", sampling=Sampling(seed=3)),
            client.chat([ChatMessage("user", "hello")], request_id="b", session_id="s"),
        )
        return list(replies)

    assert with_client(scripted_target, use) == [
        Reply("two words", (100, 101), receipt("a", 2)),
        Reply("hello", (100,), receipt("b", 1)),
    ]
    sent = {request.request_id: request for request in scripted.requests}
    assert sent["a"].sampling.seed == 3
    assert sent["b"].session_id == "s"
    assert sent["b"].chat.messages[0].role == "user"


def test_several_replies_to_one_prompt(scripted_target: str, scripted: ScriptedInference) -> None:
    replies = with_client(scripted_target, lambda client: client.replies("two words", 2, request_id="r"))
    assert replies == [Reply("two words", (100, 101), receipt(f"r-{each}", 2)) for each in range(2)]
    assert {request.request_id for request in scripted.requests} == {"r-0", "r-1"}


def test_closing_a_stream_cancels_the_request(scripted_target: str, scripted: ScriptedInference) -> None:
    scripted.script = hold

    async def use(client: AsyncClient) -> list[Event]:
        async with client.stream("word") as stream:
            assert await anext(stream) == Started(1, 7)
            assert not scripted.ended.is_set()
        assert await asyncio.to_thread(scripted.ended.wait, PATIENCE)
        return [event async for event in stream]

    assert with_client(scripted_target, use) == []


def test_closing_a_stream_ends_the_iteration_in_another_task(
    scripted_target: str, scripted: ScriptedInference
) -> None:
    scripted.script = hold

    async def use(client: AsyncClient) -> list[Event]:
        events: list[Event] = []
        stream = client.stream("word")
        task = await listening(stream, events)
        await stream.close()
        await asyncio.wait_for(task, PATIENCE)
        return events

    assert with_client(scripted_target, use) == [Started(1, 7), Tokens(0, (100,), "held")]
    assert scripted.ended.wait(PATIENCE)


def test_cancelling_the_task_cancels_the_request(scripted_target: str, scripted: ScriptedInference) -> None:
    scripted.script = hold

    async def use(client: AsyncClient) -> None:
        task = await listening(client.stream("word"), [])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(scripted.ended.wait, PATIENCE)

    with_client(scripted_target, use)


def test_closing_the_client_cancels_what_runs(scripted_target: str, scripted: ScriptedInference) -> None:
    scripted.script = hold

    async def use(client: AsyncClient) -> None:
        task = await listening(client.stream("word"), [])
        await client.close()
        with pytest.raises(RequestCancelledError):
            await asyncio.wait_for(task, PATIENCE)

    with_client(scripted_target, use)
    assert scripted.ended.wait(PATIENCE)


def test_the_timeout_ends_a_reply(scripted_target: str, scripted: ScriptedInference) -> None:
    scripted.script = hold

    async def use(client: AsyncClient) -> None:
        with pytest.raises(RequestTimeoutError, match=scripted_target):
            await client.generate("word", timeout=0.2)

    with_client(scripted_target, use)


def test_refusals_arrive_as_they_were_raised(scripted_target: str, scripted: ScriptedInference) -> None:
    error = OverloadedError("64 requests wait", retry_delay=2.5)
    scripted.script = refuse(error)

    async def use(client: AsyncClient) -> None:
        with pytest.raises(OverloadedError) as caught:
            await client.generate("word")
        assert vars(caught.value) == vars(error)

    with_client(scripted_target, use)


def test_requests_that_cannot_be_sent_are_named(scripted_target: str, scripted: ScriptedInference) -> None:
    async def use(client: AsyncClient) -> None:
        with pytest.raises(InvalidRequestError, match=r"prompt .* not -1"):
            await client.generate([-1])
        with pytest.raises(InvalidRequestError, match="limit is 8388608"):
            await client.generate("x" * 8 * 2**20)

    with_client(scripted_target, use)


def test_where_nobody_listens_the_target_is_named(deaf_target: str) -> None:
    async def use(client: AsyncClient) -> None:
        for call in (client.generate("word"), client.cluster_state()):
            with pytest.raises(UnavailableError, match=deaf_target) as caught:
                await call
            assert caught.value.retry_delay == 1.0

    with_client(deaf_target, use)


def test_sessions_end_once(scripted_target: str) -> None:
    async def use(client: AsyncClient) -> int:
        await client.generate("one", session_id="s")
        turns = await client.end_session("s")
        with pytest.raises(UnknownSessionError, match="'s'"):
            await client.end_session("s")
        return turns

    assert with_client(scripted_target, use) == 1


def test_the_state_of_the_cluster_arrives(scripted_target: str) -> None:
    assert with_client(scripted_target, lambda client: client.cluster_state()) == STATE
