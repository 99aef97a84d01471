"""The router behind a real gRPC server, with a head that a test scripts."""

import asyncio
import random
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from fake_head import PATIENCE, cancelled, failed, finished, hello, tokens, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_router import GREEDY, LONG, MAX_MESSAGE_BYTES, NOBODY, Site, events_of, run, site

from cluster.admit.request import ValidatedRequest
from cluster.edge.server import serve, server_credentials
from cluster.front.front import Front
from cluster.front.tenants import Tenant, Tenants
from cluster.route.router import Router
from pyramidserve import AsyncClient
from pyramidserve.errors import (
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PortInUseError,
    RequestConflictError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
)
from pyramidserve.types import Compression, Receipt, Sampling, Started, Stopping, Tokens
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1 import pipeline_pb2
from workers.model.transcript import Transcript


@dataclass(frozen=True)
class TLSFiles:
    """A certificate that vouches for itself, and its key."""

    certificate: Path
    key: Path


@pytest.fixture
def tls(tmp_path: Path) -> TLSFiles:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, and makes the certificate")
    files = TLSFiles(tmp_path / "certificate.pem", tmp_path / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", files.key, "-out", files.certificate),
        ],
        check=True,
        capture_output=True,
    )
    return files


def test_a_reply_end_to_end() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            stream = at.stream(session_id="s")
            assert await anext(stream) == Started(1, 7)
            start = await head.started()
            await head.report(pipeline_pb2.StepReport(tokens=[tokens(start.sequence_id, 0, 5)]))
            assert await anext(stream) == Tokens(0, (5,), " 5")
            end = finished(start.sequence_id, start.request_id, 1)
            await head.report(pipeline_pb2.StepReport(finished=[end]))
            receipt = await anext(stream)
            assert isinstance(receipt, Receipt)
            assert (receipt.request_id, receipt.pipeline_id) == ("r", "p")
            assert receipt.time_to_first_token > 0
            assert await events_of(stream) == []
            state = await at.client.cluster_state()
            assert state.decisions == {"admitted": 1, "finished": 1}
            assert [each.pipeline_id for each in state.pipelines] == ["p"]
            assert await at.client.end_session("s") == 1
            with pytest.raises(UnknownSessionError, match="'s'"):
                await at.client.end_session("s")
            await at.emptied()

    run(scenario)


def test_a_running_reply_is_joined_and_resumed() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            first = at.stream()
            await anext(first)
            key = (await head.started()).sequence_id
            await head.report(pipeline_pb2.StepReport(tokens=[tokens(key, 0, 5), tokens(key, 1, 6)]))
            await anext(first)
            joined, resumed = at.stream(), at.stream(resume_output_ids=[5])
            assert [await anext(joined), await anext(joined)] == [Started(1, 7), Tokens(0, (5, 6), " 5 6")]
            assert [await anext(resumed), await anext(resumed)] == [Started(1, 7), Tokens(1, (6,), " 6")]
            with pytest.raises(RequestConflictError, match="other content"):
                await events_of(at.stream(stopping=Stopping(max_tokens=9)))
            with pytest.raises(RequestConflictError, match="resume_output_ids"):
                await events_of(at.stream(resume_output_ids=[9]))
            await head.report(pipeline_pb2.StepReport(finished=[finished(key)]))
            for stream in (first, joined, resumed):
                assert isinstance((await events_of(stream))[-1], Receipt)
            await at.emptied()

    run(scenario)


def test_a_reply_is_resumed_on_another_pipeline() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            running = asyncio.create_task(head.run())
            events = await events_of(at.stream(resume_output_ids=[0, 1, 2]))
            output = [event for event in events if isinstance(event, Tokens)]
            assert [token_id for each in output for token_id in each.token_ids] == list(range(3, 16))
            running.cancel()

    run(scenario)


def test_closing_frees_the_ledger_once_the_head_confirms() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            stream = at.stream(stopping=LONG)
            await anext(stream)
            key = (await head.started()).sequence_id
            await stream.close()
            assert await head.cancelled() == key
            assert at.reserved() == [4, 4]  # half of the growth to come
            await head.report(pipeline_pb2.StepReport(failed=[cancelled(key)]))
            await at.emptied()
            assert at.reserved() == [0, 0]

    run(scenario)


def test_a_deadline_cancels() -> None:
    async def scenario() -> None:
        async with site() as at:
            with pytest.raises(RequestTimeoutError):
                await events_of(at.client.stream([1], timeout=0.1))
            await at.emptied()

    run(scenario)


def test_a_stream_goes_on_with_another_head_when_one_is_lost() -> None:
    async def scenario() -> None:
        async with site() as at:
            async with at.head() as head:
                stream = at.stream()
                await anext(stream)
                start = await head.started()
                await head.report(pipeline_pb2.StepReport(tokens=[tokens(start.sequence_id, 0, 0)]))
                assert await anext(stream) == Tokens(0, (0,), " 0")
            await until(lambda: not at.router.serving)
            async with at.head(hello("other")) as head:
                answering = asyncio.create_task(head.run())
                *rest, receipt = await events_of(stream)
                answering.cancel()
            chunks = [event for event in rest if isinstance(event, Tokens)]
            assert [token for chunk in chunks for token in chunk.token_ids] == list(range(1, 16))
            assert isinstance(receipt, Receipt)
            assert (receipt.pipeline_id, receipt.replays) == ("other", 1)
            await at.emptied()

    run(scenario)


def test_a_head_that_lies_about_its_pages_is_sent_away_and_another_goes_on() -> None:
    async def scenario() -> None:
        async with site() as at:
            async with at.head() as liar:
                stream = at.stream()
                await anext(stream)
                start = await liar.started()
                absurd = [pipeline_pb2.StageMemory(pages_in_use=-1)] * 2
                told = [tokens(start.sequence_id, 0, 0)]
                await liar.report(pipeline_pb2.StepReport(tokens=told, memory=absurd))
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await liar.ended()
                assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "reports -1 of 8 pages" in str(ended.value.details())
            async with at.head(hello("other")) as head:
                answering = asyncio.create_task(head.run())
                *rest, receipt = await events_of(stream)
                answering.cancel()
            chunks = [event for event in rest if isinstance(event, Tokens)]
            assert [token for chunk in chunks for token in chunk.token_ids] == list(range(16))
            assert isinstance(receipt, Receipt)
            assert receipt.replays == 1
            await at.emptied()

    run(scenario)


def test_what_a_head_had_no_room_for_is_sent_again() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            stream = at.stream()
            await anext(stream)
            first = (await head.started()).sequence_id
            refusal = failed(first, pipeline_pb2.SequenceFailed.CAUSE_NO_ROOM)
            await head.report(pipeline_pb2.StepReport(failed=[refusal]))
            second = (await head.started()).sequence_id
            assert second != first
            await head.report(pipeline_pb2.StepReport(finished=[finished(second)]))
            assert isinstance((await events_of(stream))[-1], Receipt)

    run(scenario)


def test_a_full_queue_refuses_with_a_delay() -> None:
    async def scenario() -> None:
        async with site(queue_limit=1) as at:
            waiting = at.stream("a")
            await anext(waiting)
            with pytest.raises(OverloadedError, match="1 requests are waiting") as refused:
                await events_of(at.stream("b"))
            assert refused.value.retry_delay == 1.0
            await waiting.close()
            await at.emptied()

    run(scenario)


def test_bad_requests_are_refused_by_name() -> None:
    async def scenario() -> None:
        async with site() as at, at.head():
            with pytest.raises(RequestTooLargeError, match="needs 13 pages of stage 0"):
                await events_of(at.stream(stopping=Stopping(max_tokens=200)))
            with pytest.raises(InvalidRequestError, match="top_p is 7"):
                await events_of(at.stream(sampling=Sampling(top_p=7.0)))
            await at.emptied()

    run(scenario)


def test_an_error_tells_its_reason_in_any_alphabet() -> None:
    async def scenario() -> None:
        async with site() as at:
            with pytest.raises(InvalidRequestError, match="unknown policy '🦙") as refused:
                await events_of(at.stream(compression=Compression("🦙" * 2000)))
            assert refused.value.reason == "invalid_request"

    run(scenario)


def test_an_oversize_message_is_refused() -> None:
    async def scenario() -> None:
        async with site() as at:
            with pytest.raises(InvalidRequestError) as refused:
                await events_of(at.client.stream("x" * (MAX_MESSAGE_BYTES + 1)))
            assert refused.value.reason == "message_too_large"

    run(scenario)


def test_an_unexpected_error_tells_clients_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(request: pb.GenerateRequest, last: Transcript | None) -> ValidatedRequest:
        raise ZeroDivisionError("secret")

    async def scenario() -> None:
        router = Router("toy", queue_limit=1, session_limit=1, session_max_age=1)
        server = await serve(
            router, Front(router, fail, NOBODY), port=0, max_message_bytes=MAX_MESSAGE_BYTES, bind_timeout=0
        )
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            with pytest.raises(EngineError) as raised:
                await client.generate("x", request_id="r-17")
        assert "secret" not in raised.value.message
        await server.stop(0)

    run(scenario)
    (record,) = [each for each in caplog.records if each.name == "cluster.front.refusal"]
    assert "r-17" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_a_refused_call_is_logged_once_with_its_ids(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with site() as at:
            with pytest.raises(UnknownSessionError):
                await at.client.end_session("s\n17")

    caplog.set_level("INFO", "cluster.front.refusal")
    run(scenario)
    (record,) = [each for each in caplog.records if each.name == "cluster.front.refusal"]
    assert "session_id='s\\n17' tenant='' reason='unknown_session'" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_pipeline_of_another_model_is_refused() -> None:
    async def scenario() -> None:
        async with site() as at:
            async with at.head(hello(model="other")) as head:
                with pytest.raises(grpc.aio.AioRpcError, match="'other'") as refused:
                    await head.ended()
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert not at.router.serving

    run(scenario)


def test_a_second_hello_ends_the_stream() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            await head.introduce(hello())
            with pytest.raises(grpc.aio.AioRpcError, match="not a StepReport") as refused:
                await head.ended()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await until(lambda: not at.router.serving)

    run(scenario)


def test_a_pipeline_that_attaches_again_ends_its_old_stream() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as old, at.head() as new:
            await old.ended()
            stream = at.stream()
            await anext(stream)
            assert (await new.started()).request_id == "r"
            await stream.close()

    run(scenario)


def test_health_follows_the_pipelines() -> None:
    async def scenario() -> None:
        async with site() as at, grpc.aio.insecure_channel(at.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="pyramidserve.v1.Inference"))
            statuses = [(await watch.read()).status]
            async with at.head():
                statuses.append((await watch.read()).status)
            statuses.append((await watch.read()).status)
            serving, not_serving = (
                health_pb2.HealthCheckResponse.SERVING,
                health_pb2.HealthCheckResponse.NOT_SERVING,
            )
            assert statuses == [not_serving, serving, not_serving]
            whole = await stub.Check(health_pb2.HealthCheckRequest())
            assert whole.status == serving
            watch.cancel()

    run(scenario)


def test_a_port_in_use_is_named() -> None:
    async def scenario() -> None:
        async with site() as at:
            with pytest.raises(PortInUseError, match=f"127.0.0.1:{at.server.port}.*choose another port"):
                await serve(at.router, at.front, port=at.server.port, max_message_bytes=1, bind_timeout=0)

    run(scenario)


def test_a_replacement_waits_for_the_port() -> None:
    async def scenario() -> None:
        async with site() as at:
            replacement = asyncio.create_task(
                serve(
                    at.router,
                    at.front,
                    port=at.server.port,
                    max_message_bytes=MAX_MESSAGE_BYTES,
                    bind_timeout=PATIENCE,
                )
            )
            await asyncio.sleep(0)
            await at.server.stop(0)
            server = await replacement
            assert server.port == at.server.port
            await server.stop(0)

    run(scenario)


def test_stopping_lets_running_replies_end() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            stream = at.stream()
            await anext(stream)
            key = (await head.started()).sequence_id
            stopping = asyncio.create_task(at.server.stop(PATIENCE))
            # Sent again, on a new connection, as another may have taken over; nobody has.
            with pytest.raises(UnavailableError, match="no server answers"):
                await events_of(at.stream("late"))
            await head.report(pipeline_pb2.StepReport(finished=[finished(key)]))
            assert isinstance((await events_of(stream))[-1], Receipt)
            await head.ended()
            await stopping

    run(scenario)


def test_disconnecting_at_any_moment_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(0)

    async def disconnect(at: Site, number: int) -> None:
        async with AsyncClient(at.target) as client:
            stream = client.stream([1], request_id=f"r{number % 7}", sampling=GREEDY, stopping=LONG)
            with suppress(OverloadedError):
                for _ in range(chance.choice((0, 0, 1, 2, 3))):  # tokens may be told together
                    await anext(stream)
                # Some moments lie between events: while tokenising, queueing or in a write.
                for _ in range(chance.randrange(30)):
                    await asyncio.sleep(0)
            await stream.close()

    async def scenario() -> None:
        async with site(queue_limit=8) as at, at.head() as head:
            running = asyncio.create_task(head.run())
            for first in range(0, 50, 10):
                await asyncio.gather(*(disconnect(at, number) for number in range(first, first + 10)))
            await at.emptied()
            assert at.reserved() == [0, 0]
            assert at.router.state().decisions["cancelled"] > 0
            running.cancel()

    run(scenario)
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []


def test_callers_are_told_apart_by_their_tokens() -> None:
    async def scenario() -> None:
        tenants = Tenants({"a-token": Tenant("a"), "b-token": Tenant("b")})
        async with site(tenants=tenants) as at, at.head() as head:
            with pytest.raises(UnauthenticatedError, match="is missing"):
                await events_of(at.stream())
            with pytest.raises(UnauthenticatedError, match="is missing"):
                await at.client.cluster_state()
            async with (
                AsyncClient(at.target, timeout=PATIENCE, token="a-token") as a,
                AsyncClient(at.target, timeout=PATIENCE, token="b-token") as b,
            ):
                answering = asyncio.create_task(head.run())
                # The same ids are no conflict between tenants, and the sessions are each one's own.
                for client, prompt in ((a, [1]), (b, [2])):
                    await client.generate(
                        prompt, request_id="r", session_id="s", stopping=Stopping(max_tokens=2)
                    )
                assert await a.end_session("s") == 1
                with pytest.raises(UnknownSessionError):
                    await a.end_session("s")
                assert await b.end_session("s") == 1
                answering.cancel()
            await at.emptied()

    run(scenario)


def test_a_deadline_that_cannot_be_met_is_told_at_once() -> None:
    async def scenario() -> None:
        async with site() as at, at.head() as head:
            answering = asyncio.create_task(head.run())
            await events_of(at.stream("learnt from", stopping=Stopping(max_tokens=16)))
            answering.cancel()
            at.router._admission._pace.count(10.0)  # seconds a token
            with pytest.raises(RequestTimeoutError, match="16 output tokens would take") as refused:
                await events_of(at.client.stream([1], timeout=30.0, stopping=Stopping(max_tokens=16)))
            assert refused.value.reason == "deadline_unreachable"
            await at.emptied()

    run(scenario)


def test_clients_and_the_router_speak_tls(tls: TLSFiles) -> None:
    async def scenario() -> None:
        credentials = server_credentials(str(tls.certificate), str(tls.key))
        async with site(credentials=credentials) as at, at.head() as head:
            answering = asyncio.create_task(head.run())
            async with AsyncClient(at.target, certificate=tls.certificate.read_bytes()) as client:
                reply = await client.generate([1], stopping=Stopping(max_tokens=3))
                assert len(reply.token_ids) == 3
            with pytest.raises(UnavailableError):
                await at.client.cluster_state()
            answering.cancel()

    run(scenario)


@pytest.mark.parametrize(("certificate", "key"), [("/nowhere.pem", ""), ("", "/nowhere.pem")])
def test_tls_files_that_are_not_there_are_named(certificate: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.pem.*give both"):
        server_credentials(certificate, key)
