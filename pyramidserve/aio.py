"""The asyncio client."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio

from pyramidserve._requests import (
    DEFAULT_TARGET,
    Access,
    RequestOptions,
    assemble,
    generate_request,
    generate_requests,
    named_errors,
)
from pyramidserve._resume import RESUME_SECONDS, Resumption
from pyramidserve.errors import PyramidServeError, RequestCancelledError
from pyramidserve.prompt import Prompt
from pyramidserve.types import ChatMessage, ClusterState, Event, Reply
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import InferenceStub
from pyramidserve.wire import cluster_state_from_message, event_from_message
from pyramidserve.wire.connection import MAX_MESSAGE_BYTES, channel_options

Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
StartCall = Callable[[pb.GenerateRequest, float | None], Call]


class AsyncReplyStream(AsyncIterator[Event]):
    """The events of one reply as they come: Started, any number of Tokens, Receipt.

    Closing it, leaving its ``async with`` block or cancelling the task that iterates it cancels the
    request wherever it is. After closing, iteration ends. Iterating raises the errors of
    ``pyramidserve.errors``. A lost server is waited for as by ``pyramidserve.client.ReplyStream``.

    Attributes:
        request_id: the request; sending it again joins the running reply.
    """

    def __init__(self, start: StartCall, resumption: Resumption, target: str, request_id: str) -> None:
        """``start`` begins a call for a request, with the seconds that it may take."""
        self.request_id = request_id
        self._start, self._resumption, self._target = start, resumption, target
        self._call = start(*resumption.rest())
        self._messages = aiter(self._call)
        self._closed = asyncio.Event()

    async def __anext__(self) -> Event:
        while not self._closed.is_set():
            try:
                with _named_errors(self._target):
                    event = event_from_message(await anext(self._messages))
            except PyramidServeError as error:
                if self._closed.is_set():
                    break
                await self._resume(error)
            else:
                if self._resumption.take(event):
                    return event
        raise StopAsyncIteration

    async def _resume(self, error: PyramidServeError) -> None:
        """Asks for the rest, or raises ``error`` where that is of no use."""
        delay = self._resumption.delay(error)
        if delay is None:
            raise error
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), delay)
            return
        self._call = self._start(*self._resumption.rest())
        self._messages = aiter(self._call)

    async def close(self) -> None:
        """Cancels the request unless the reply is complete."""
        self._closed.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncClient:
    """A connection to a PyramidServe cluster; use it in an ``async with`` block.

    It belongs to the event loop that runs when it is made. Every method raises the errors of
    ``pyramidserve.errors`` and nothing of gRPC.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        token: str | None = None,
        certificate: bytes | None = None,
        resume_seconds: float = RESUME_SECONDS,
    ) -> None:
        """Connects on first use.

        Args:
            target: "host:port" of the router.
            timeout: seconds that any call may take in all; None sets no limit.
            max_message_bytes: bytes that one message may have, either way.
            token: names the tenant, where the cluster wants one.
            certificate: PEM of the authority that TLS is to trust, or of the router itself; without it
                there is no TLS.
            resume_seconds: how long a reply that has begun waits for a lost server; 0: not at all.
        """
        self._target = target
        self._timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._resume_seconds = resume_seconds
        access, options = Access(token, certificate), channel_options(max_message_bytes)
        self._metadata = access.metadata
        self._channel = (
            grpc.aio.secure_channel(target, access.credentials, options)
            if access.credentials
            else grpc.aio.insecure_channel(target, options)
        )
        self._stub = InferenceStub(self._channel)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncReplyStream:
        """Asks for a reply and returns at once; as ``Client.stream``."""
        return self._begin(generate_request(prompt, self._max_message_bytes, **options), timeout)

    def streams(
        self, prompt: Prompt, n: int, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> list[AsyncReplyStream]:
        """Asks for ``n`` replies to one prompt and returns at once; as ``Client.streams``."""
        requests = generate_requests(prompt, n, self._max_message_bytes, **options)
        return [self._begin(request, timeout) for request in requests]

    def _begin(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncReplyStream:
        def start(rest: pb.GenerateRequest, left: float | None) -> Call:
            return self._stub.Generate(rest, timeout=left, metadata=self._metadata)

        seconds = self._timeout if timeout is None else timeout
        resumption = Resumption(request, seconds, self._resume_seconds)
        return AsyncReplyStream(start, resumption, self._target, request.request_id)

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> Reply:
        """Waits for the whole reply; as ``Client.generate``."""
        async with self.stream(prompt, timeout=timeout, **options) as events:
            return assemble([event async for event in events])

    async def replies(
        self, prompt: Prompt, n: int, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> list[Reply]:
        """Waits for ``n`` whole replies to one prompt; as ``Client.replies``."""
        async with AsyncExitStack() as stack:
            streams = self.streams(prompt, n, timeout=timeout, **options)
            for each in streams:
                await stack.enter_async_context(each)
            return [assemble([event async for event in each]) for each in streams]

    async def chat(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Reply:
        """Waits for the assistant's next message in a conversation; as ``Client.chat``."""
        return await self.generate(messages, timeout=timeout, **options)

    async def end_session(self, session_id: str) -> int:
        """Ends a session and returns the turns served under it.

        Raises:
            UnknownSessionError: there is no such session.
        """
        request = pb.EndSessionRequest(session_id=session_id)
        with _named_errors(self._target):
            return (
                await self._stub.EndSession(request, timeout=self._timeout, metadata=self._metadata)
            ).turns

    async def cluster_state(self) -> ClusterState:
        """A snapshot of the queue, the attached pipelines and their memory."""
        request = pb.GetClusterStateRequest()
        with _named_errors(self._target):
            message = await self._stub.GetClusterState(
                request, timeout=self._timeout, metadata=self._metadata
            )
        return cluster_state_from_message(message)

    async def close(self) -> None:
        """Disconnects and cancels what is running; the client is of no use afterwards."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


@contextmanager
def _named_errors(target: str) -> Iterator[None]:
    try:
        with named_errors(target):
            yield
    except asyncio.CancelledError:
        # gRPC says the same where the call was closed as where the task was cancelled.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RequestCancelledError("the stream or its client was closed") from None
