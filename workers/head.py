"""The head of a pipeline towards the router: attaches, takes orders, reports every step."""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from pyramidserve import wire
from pyramidserve.types import Compression
from pyramidserve.v1 import pipeline_pb2 as messages
from pyramidserve.v1.pipeline_pb2_grpc import PipelineRegistryStub
from pyramidserve.wire.connection import UNLIMITED, channel_options, endpoint
from workers.budget.span import Span
from workers.engine.loop import SequenceBroken, SequenceCancelled, SequenceFinished, SequenceTokens
from workers.engine.runner import Cancel, EndSession, EngineRunner, Report, SequenceRefused, Start
from workers.events import tell
from workers.rendezvous import look_up
from workers.schedule.sequence import SequenceRequest
from workers.schedule.step import NOT_FINITE, ShardMemory
from workers.tools.reader import CallSyntax

if TYPE_CHECKING:  # the stubs' types alone have this name
    from pyramidserve.v1.pipeline_pb2_grpc import PipelineRegistryAsyncStub

    Call = grpc.aio.StreamStreamCall[messages.PipelineReport, messages.RouterOrder]

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5


class Head:
    """Keeps a pipeline attached to the router, and ends what a lost router had asked for.

    Attributes:
        demand: how many pipelines there should be, as the router said last.
    """

    def __init__(self, hello: messages.Hello, router_key: str) -> None:
        self._hello = hello
        self._router_key = router_key
        # None says that the pipeline is to be taken away.
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._leaving = self._is_attached = False
        self._gone = asyncio.Event()
        self.demand = 0.0

    def take(self, report: Report) -> None:
        """Queues what the engine reports; call it in the event loop's thread."""
        self._reports.put_nowait(report)

    async def run(self, runner: EngineRunner) -> None:
        """Attaches, and attaches again whenever the stream breaks; ends when it has left."""
        while not self._leaving:
            address = await look_up(self._router_key)
            target = endpoint(str(address["host"]), int(address["port"]))
            try:
                async with grpc.aio.insecure_channel(target, channel_options(UNLIMITED)) as channel:
                    await self._attached(PipelineRegistryStub(channel), runner)
            except grpc.aio.AioRpcError as error:
                status, details = error.code().name, error.details()
                tell(logger, logging.WARNING, "router_lost", target=target, status=status, details=details)
            await self._drain(runner)
            await asyncio.sleep(RETRY_SECONDS)
        self._gone.set()

    async def leave(self) -> None:
        """Takes nothing new any more; returns when all that runs has ended, or the router is lost."""
        self._leaving = True
        if self._is_attached:
            self._reports.put_nowait(None)
            await self._gone.wait()

    async def _attached(self, stub: "PipelineRegistryAsyncStub", runner: EngineRunner) -> None:
        self._is_attached = True
        call = stub.Attach()
        # Ours to cancel: gRPC would leave a request iterator of a broken call waiting for the next report.
        writing = asyncio.create_task(self._write(call))
        writing.add_done_callback(lambda _: call.cancel())
        tell(logger, logging.INFO, "attaching")
        try:
            async for order in call:
                if order.start:
                    runner.order(Start(tuple(map(_request, order.start)), order.queued))
                for start in order.start:
                    ids = {"request_id": start.request_id, "sequence": start.sequence_id}
                    tell(logger, logging.INFO, "sequence_ordered", **ids)
                if order.cancel:
                    runner.order(Cancel(tuple(order.cancel)))
                if order.end_sessions:
                    runner.order(EndSession(tuple(order.end_sessions)))
                if order.HasField("demand"):
                    self.demand = order.demand
        finally:
            self._is_attached = False
            writing.cancel()
            (failure,) = await asyncio.gather(writing, return_exceptions=True)
            call.cancel()
            if isinstance(failure, Exception) and not isinstance(failure, grpc.RpcError):
                raise failure

    async def _write(self, call: "Call") -> None:
        await call.write(messages.PipelineReport(hello=self._hello))
        while True:
            report = await self._reports.get()
            if report is None:
                await call.write(messages.PipelineReport(leaving=messages.Leaving()))
            else:
                await call.write(messages.PipelineReport(step=_step_report(report)))

    async def _drain(self, runner: EngineRunner) -> None:
        """Cancels all sequences and waits until their memory is free, as a new router counts on."""
        orders = runner.order(Cancel(None))
        while True:
            report = await self._reports.get()
            if report is not None and report.idle and report.orders == orders:
                return


def _request(start: messages.StartSequence) -> SequenceRequest:
    return SequenceRequest(
        sequence=start.sequence_id,
        request_id=start.request_id,
        prompt_ids=tuple(start.prompt_ids),
        sampling=wire.sampling_from_message(start.sampling),
        stopping=wire.stopping_from_message(start.stopping),
        compression=wire.compression_from_message(start.compression, Compression()),
        forced_output_ids=tuple(start.forced_output_ids),
        expected_tokens=start.expected_tokens,
        session_id=start.session_id,
        untold=start.untold_output_ids,
        constraint=wire.constraint_from_message(start),
        calls=_calls(start.calls) if start.HasField("calls") else None,
        instructions=tuple(Span(each.first, each.end) for each in start.instructions),
    )


def _calls(message: messages.CallSyntax) -> CallSyntax:
    return CallSyntax(message.form, tuple(message.names), message.single, tuple(message.texts))


def _step_report(report: Report) -> messages.StepReport:
    message = messages.StepReport(memory=_memory(report.memory))
    failed = messages.SequenceFailed
    for event in report.events:
        match event:
            case SequenceTokens(sequence, tokens):
                message.tokens.add(sequence_id=sequence, tokens=wire.tokens_to_message(tokens))
            case SequenceFinished(sequence, receipt):
                message.finished.add(sequence_id=sequence, receipt=wire.receipt_to_message(receipt))
            case SequenceCancelled(sequence):
                message.failed.add(sequence_id=sequence, cause=failed.CAUSE_CANCELLED)
            case SequenceBroken(sequence, why):
                finite = why != NOT_FINITE
                cause = failed.CAUSE_POLICY if finite else failed.CAUSE_NOT_FINITE
                message.failed.add(sequence_id=sequence, cause=cause, detail=why if finite else "")
            case SequenceRefused(sequence):
                message.failed.add(sequence_id=sequence, cause=failed.CAUSE_NO_ROOM)
    return message


def _memory(shards: Sequence[ShardMemory]) -> list[messages.StageMemory]:
    return [
        messages.StageMemory(
            pages_in_use=shard.pages_in_use,
            host_bytes=shard.host_bytes,
            resident_bytes=shard.resident_bytes,
            device_bytes=shard.device_bytes,
            device_peak_bytes=shard.device_peak_bytes,
        )
        for shard in shards
    ]
