"""A head of a pipeline that does what a test says, and the requests that it gets."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc.aio

from cluster.admit.request import ValidatedRequest
from pyramidserve.types import Compression, Sampling, StageState, Stopping
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1 import pipeline_pb2
from pyramidserve.v1.pipeline_pb2_grpc import PipelineRegistryStub
from workers.policies.registry import versions

MODEL = "toy"
PATIENCE = 60  # seconds that anything may take before the test fails


def hello(
    pipeline_id: str = "p",
    pages: tuple[int, ...] = (8, 8),
    max_sequences: int = 8,
    model: str = MODEL,
    kv_dtype: str = "float32",
) -> pipeline_pb2.Hello:
    """A pipeline with one layer and ``pages[rank]`` pages a stage."""
    return pipeline_pb2.Hello(
        pipeline_id=pipeline_id,
        model=model,
        max_sequences=max_sequences,
        policies=versions(),
        stages=[
            pb.StageState(
                first_layer=rank, end_layer=rank + 1, pages_total=count, page_bytes=4096, kv_dtype=kv_dtype
            )
            for rank, count in enumerate(pages)
        ],
    )


def stage(first: int, end: int, pages: int = 8, page_bytes: int = 4096, host_pages: int = 0) -> StageState:
    """A shard of layers ``first`` to ``end`` that has done nothing; its host has no whole page more."""
    return StageState(
        first_layer=first,
        end_layer=end,
        pid=1,
        node="n",
        pages_total=pages,
        pages_in_use=0,
        pages_reserved=0,
        page_bytes=page_bytes,
        host_bytes=0,
        host_bytes_limit=host_pages * page_bytes + 17,
        workspace_bytes=0,
        resident_bytes=0,
        device_bytes=0,
        device_peak_bytes=0,
    )


def request(
    request_id: str = "r",
    pages: int = 1,
    *,
    session_id: str = "",
    resume_output_ids: tuple[int, ...] = (),
    seed: int = 7,
    seed_given: bool = True,
) -> ValidatedRequest:
    """A request that takes ``pages`` of each layer from its beginning on, and has 16 output tokens."""
    return ValidatedRequest(
        request_id=request_id,
        prompt_ids=(1,) * (16 * pages - 15),
        sampling=Sampling(seed=seed),
        stopping=Stopping(max_tokens=16),
        compression=Compression("full"),
        session_id=session_id,
        resume_output_ids=resume_output_ids,
        seed_given=seed_given,
    )


def tokens(sequence_id: int, index: int, *token_ids: int) -> pipeline_pb2.SequenceTokens:
    """Output whose text is its ids, each behind a blank."""
    text = "".join(f" {token_id}" for token_id in token_ids)
    return pipeline_pb2.SequenceTokens(
        sequence_id=sequence_id, tokens=pb.Tokens(index=index, token_ids=token_ids, text=text)
    )


def finished(
    sequence_id: int, request_id: str = "r", output_tokens: int = 0
) -> pipeline_pb2.SequenceFinished:
    """The end of a sequence by its length."""
    return pipeline_pb2.SequenceFinished(
        sequence_id=sequence_id,
        receipt=pb.Receipt(
            request_id=request_id, finish_reason=pb.FINISH_REASON_LENGTH, output_tokens=output_tokens
        ),
    )


def failed(
    sequence_id: int, cause: pipeline_pb2.SequenceFailed.Cause.ValueType
) -> pipeline_pb2.SequenceFailed:
    """The end of a sequence for another reason."""
    return pipeline_pb2.SequenceFailed(sequence_id=sequence_id, cause=cause)


def cancelled(sequence_id: int) -> pipeline_pb2.SequenceFailed:
    """The confirmation of a cancellation."""
    return failed(sequence_id, pipeline_pb2.SequenceFailed.CAUSE_CANCELLED)


class FakeHead:
    """An attached pipeline; leaving its block breaks the stream."""

    def __init__(self, target: str, introduction: pipeline_pb2.Hello) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._stub = PipelineRegistryStub(self._channel)
        self._introduction = introduction

    async def __aenter__(self) -> Self:
        self._call = self._stub.Attach(timeout=PATIENCE)
        await self.introduce(self._introduction)
        await self._call.initial_metadata()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call.cancel()
        await self._channel.close()

    async def started(self) -> pipeline_pb2.StartSequence:
        """The next order, which must be to start a sequence."""
        (start,) = (await self._order()).start
        return start

    async def cancelled(self) -> int:
        """The next order, which must be to cancel a sequence: its id."""
        (sequence_id,) = (await self._order()).cancel
        return sequence_id

    async def introduce(self, introduction: pipeline_pb2.Hello) -> None:
        """Says Hello."""
        await self._call.write(pipeline_pb2.PipelineReport(hello=introduction))

    async def report(self, step: pipeline_pb2.StepReport) -> None:
        """Says what a step brought."""
        await self._call.write(pipeline_pb2.PipelineReport(step=step))

    async def ended(self) -> None:
        """Waits until the router has ended the stream. Raises AioRpcError unless in good order."""
        while await self._call.read() is not grpc.aio.EOF:
            pass

    async def run(self, *begun: tuple[pipeline_pb2.StartSequence, int]) -> None:
        """Answers every order: each request gets its whole output, one token a step.

        ``begun``: sequences that run already, and how much output they have.
        """
        running = {
            start.sequence_id: (start.request_id, done, start.stopping.max_tokens) for start, done in begun
        }
        orders = asyncio.create_task(self._order())
        while True:
            await asyncio.wait([orders], timeout=None if not running else 0)
            step = pipeline_pb2.StepReport()
            if orders.done():
                order = orders.result()
                for start in order.start:
                    done = len(start.forced_output_ids) - start.untold_output_ids
                    running[start.sequence_id] = start.request_id, done, start.stopping.max_tokens
                for sequence_id in order.cancel:
                    if running.pop(sequence_id, None):
                        step.failed.append(cancelled(sequence_id))
                orders = asyncio.create_task(self._order())
            for sequence_id, (request_id, done, most) in list(running.items()):
                if done < most:  # else all of it was known
                    step.tokens.append(tokens(sequence_id, done, done))
                    done += 1
                running[sequence_id] = request_id, done, most
                if done == most:
                    del running[sequence_id]
                    step.finished.append(finished(sequence_id, request_id, most))
            await self.report(step)

    async def _order(self) -> pipeline_pb2.RouterOrder:
        order = await self._call.read()
        assert isinstance(order, pipeline_pb2.RouterOrder), f"no order but {await self._call.code()}"
        return order


async def until(condition: Callable[[], bool]) -> None:
    """Lets the other tasks run until ``condition`` holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)
