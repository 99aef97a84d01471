"""A peer that is gone without a word is noticed, and one that is only silent is left alone."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc.aio
import pytest
from black_hole import way_to
from fake_head import FakeHead, hello, tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_router import GREEDY, run, site

from pyramidserve import AsyncClient, Client
from pyramidserve.types import Event, Receipt, Stopping, Tokens
from pyramidserve.v1 import pipeline_pb2
from pyramidserve.wire import connection
from workers import head as head_of_pipeline
from workers.engine.runner import Cancel, Order, Report
from workers.head import Head

# Enough for a machine that is busy with other things.
SILENCE_SECONDS, ANSWER_SECONDS = 0.5, 1.5
NOTICED_SECONDS = 6 * (SILENCE_SECONDS + ANSWER_SECONDS)
THREE = Stopping(max_tokens=3)
IMPATIENT = connection.Patience(int(SILENCE_SECONDS * 1000), int(ANSWER_SECONDS * 1000))


@pytest.fixture
def impatient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CLIENT", IMPATIENT)


@pytest.fixture
def impatient_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SERVER", IMPATIENT)


async def soon(what: Awaitable[object]) -> None:
    await asyncio.wait_for(what, NOTICED_SECONDS)


@pytest.mark.usefixtures("impatient_clients")
def test_streams_whose_connections_are_lost_without_a_word_go_on() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            events: dict[str, list[Event]] = {"blocking": [], "asyncio": []}

            def read(target: str) -> None:
                with Client(target) as client:
                    stream = client.stream([1], request_id="blocking", sampling=GREEDY, stopping=THREE)
                    for event in stream:
                        events["blocking"].append(event)

            async def read_async(target: str) -> None:
                async with AsyncClient(target) as client:
                    stream = client.stream([1], request_id="asyncio", sampling=GREEDY, stopping=THREE)
                    async for event in stream:
                        events["asyncio"].append(event)

            with way_to(at.target) as way:
                reading = asyncio.gather(asyncio.to_thread(read, way.target), read_async(way.target))
                starts = [await head.started(), await head.started()]
                for start in starts:
                    report = pipeline_pb2.StepReport(tokens=[tokens(start.sequence_id, 0, 0)])
                    await head.report(report)
                # What has not begun would not go on.
                await soon(
                    _holds(lambda: all(each and isinstance(each[-1], Tokens) for each in events.values()))
                )
                way.swallow()
                running = asyncio.create_task(head.run(*((start, 1) for start in starts)))
                await soon(reading)
                running.cancel()
            for each in events.values():
                output = [new for event in each if isinstance(event, Tokens) for new in event.token_ids]
                assert output == [0, 1, 2]
                assert isinstance(each[-1], Receipt)

    run(scenario)


@pytest.mark.usefixtures("impatient_servers")
def test_a_client_that_is_lost_without_a_word_leaves_nothing_running() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            with way_to(at.target) as way:
                async with AsyncClient(way.target, resume_seconds=0) as client:
                    stream = client.stream([1], request_id="r", sampling=GREEDY, stopping=THREE)
                    await anext(stream)
                    key = (await head.started()).sequence_id
                    way.swallow()
                    assert await asyncio.wait_for(head.cancelled(), NOTICED_SECONDS) == key

    run(scenario)


@pytest.mark.usefixtures("impatient_servers")
def test_a_pipeline_that_is_lost_without_a_word_is_let_go() -> None:
    async def scenario() -> None:
        async with site() as at:
            with way_to(f"127.0.0.1:{at.server.registry_port}") as way:
                async with FakeHead(way.target, hello()):
                    assert at.router.serving
                    way.swallow()
                    await soon(_holds(lambda: not at.router.serving))

    run(scenario)


@pytest.mark.usefixtures("impatient_clients")
def test_a_head_whose_router_is_lost_without_a_word_cancels_and_attaches_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Runner:
        """Does nothing, and says so."""

        def __init__(self) -> None:
            self.cancelled = asyncio.Event()

        def order(self, order: Order) -> int:
            assert order == Cancel(None)
            self.cancelled.set()
            head.take(Report((), (), idle=True, orders=1))
            return 1

    head = Head(hello(), "key")

    async def scenario() -> None:
        async with site() as at:
            with way_to(f"127.0.0.1:{at.server.registry_port}") as way:
                host, port = way.target.split(":")

                async def look_up(key: str) -> dict[str, str | int]:
                    return {"host": host, "port": int(port)}

                monkeypatch.setattr(head_of_pipeline, "look_up", look_up)
                runner = Runner()
                running = asyncio.create_task(head.run(runner))  # type: ignore[arg-type]
                await soon(_holds(lambda: at.router.serving))
                way.swallow()
                await soon(runner.cancelled.wait())
                await soon(way.connected())
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    run(scenario)


def test_an_idle_client_that_asks_often_keeps_its_connection() -> None:
    async def scenario() -> None:
        async with site() as at:
            with way_to(at.target) as way:
                options = [
                    ("grpc.keepalive_time_ms", int(SILENCE_SECONDS * 1000)),
                    ("grpc.keepalive_permit_without_calls", 1),
                    ("grpc.http2.max_pings_without_data", 0),
                ]
                async with grpc.aio.insecure_channel(way.target, options) as channel:
                    health = health_pb2_grpc.HealthStub(channel)
                    await health.Check(health_pb2.HealthCheckRequest())
                    before = list(way.connections)
                    # Five that come too soon end it.
                    await asyncio.sleep(8 * SILENCE_SECONDS)
                    await health.Check(health_pb2.HealthCheckRequest())
                    assert way.connections == before

    run(scenario)


async def _holds(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_client_comes_back_before_a_server_gives_it_up() -> None:
    client, server = connection.CLIENT, connection.SERVER
    assert client.silence + client.answer < min(server.answer, 30_000)
