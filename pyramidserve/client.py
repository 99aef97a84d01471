"""The blocking client."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeAlias, Unpack

import grpc

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
from pyramidserve.errors import PyramidServeError
from pyramidserve.prompt import Prompt
from pyramidserve.types import ChatMessage, ClusterState, Event, Reply
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import InferenceStub
from pyramidserve.wire import cluster_state_from_message, error_from_rpc, event_from_message
from pyramidserve.wire.connection import MAX_MESSAGE_BYTES, channel_options

Call: TypeAlias = "grpc._CallIterator[pb.GenerateResponse]"
StartCall: TypeAlias = Callable[[pb.GenerateRequest, float | None], Call]


class ReplyStream(Iterator[Event]):
    """The events of one reply as they come: Started, any number of Tokens, Receipt.

    Closing it, or leaving its ``with`` block, cancels the request wherever it is; iteration then
    ends. Iterating raises the errors of ``pyramidserve.errors``. When the server is lost after the
    reply has begun, it goes on where it was as soon as there is one again.

    Attributes:
        request_id: the request; sending it again joins the running reply.
    """

    def __init__(self, start: StartCall, resumption: Resumption, target: str, request_id: str) -> None:
        """``start`` begins a call for a request, with the seconds that it may take."""
        self.request_id = request_id
        self._start, self._resumption, self._target = start, resumption, target
        self._call = start(*resumption.rest())
        self._closed = threading.Event()

    def __next__(self) -> Event:
        while not self._closed.is_set():
            try:
                event = event_from_message(next(self._call))
            except grpc.RpcError as error:
                if self._closed.is_set():
                    break
                self._resume(error_from_rpc(error, self._target), error)
            else:
                if self._resumption.take(event):
                    return event
        raise StopIteration

    def _resume(self, error: PyramidServeError, cause: grpc.RpcError) -> None:
        """Asks for the rest, or raises ``error`` where that is of no use."""
        delay = self._resumption.delay(error)
        if delay is None:
            raise error from cause
        if not self._closed.wait(delay):
            self._call = self._start(*self._resumption.rest())

    def close(self) -> None:
        """Cancels the request unless the reply is complete; may be called from any thread."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Client:
    """A connection to a PyramidServe cluster; use it in a ``with`` block. Threads may share it.

    Every method raises the errors of ``pyramidserve.errors`` and nothing of gRPC.
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
            grpc.secure_channel(target, access.credentials, options)
            if access.credentials
            else grpc.insecure_channel(target, options)
        )
        self._stub = InferenceStub(self._channel)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> ReplyStream:
        """Asks for a reply and returns at once.

        Args:
            prompt: text, token ids, or the messages of a conversation; an empty list is taken for
                token ids.
            timeout: seconds that the whole reply may take; None takes the client's.
            options: see ``RequestOptions``.

        Raises:
            InvalidRequestError: the request cannot be sent; all that the server refuses is raised
                by iterating.
        """
        return self._begin(generate_request(prompt, self._max_message_bytes, **options), timeout)

    def streams(
        self, prompt: Prompt, n: int, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> list[ReplyStream]:
        """Asks for ``n`` replies to one prompt, 1 to 128, and returns at once; see ``stream``.

        Each is a request of its own, with its number behind ``request_id``, and drawn by itself: where a
        seed is given, each with the next one. The first alone is a turn of ``session_id``.
        """
        requests = generate_requests(prompt, n, self._max_message_bytes, **options)
        return [self._begin(request, timeout) for request in requests]

    def _begin(self, request: pb.GenerateRequest, timeout: float | None) -> ReplyStream:
        def start(
            rest: pb.GenerateRequest, left: float | None
        ) -> "grpc._CallIterator[pb.GenerateResponse]":
            return self._stub.Generate(rest, timeout=left, metadata=self._metadata)

        seconds = self._timeout if timeout is None else timeout
        resumption = Resumption(request, seconds, self._resume_seconds)
        return ReplyStream(start, resumption, self._target, request.request_id)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> Reply:
        """Waits for the whole reply; see ``stream``.

        ``Reply.token_ids`` and ``Reply.text`` hold what is new, without ``resume_output_ids``.
        """
        with self.stream(prompt, timeout=timeout, **options) as events:
            return assemble(events)

    def replies(
        self, prompt: Prompt, n: int, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> list[Reply]:
        """Waits for ``n`` whole replies to one prompt; see ``streams``."""
        with ExitStack() as stack:
            streams = self.streams(prompt, n, timeout=timeout, **options)
            for each in streams:
                stack.enter_context(each)
            return [assemble(each) for each in streams]

    def chat(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]],
        *,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Reply:
        """Waits for the assistant's next message in a conversation; see ``generate``."""
        return self.generate(messages, timeout=timeout, **options)

    def end_session(self, session_id: str) -> int:
        """Ends a session and returns the turns served under it.

        Raises:
            UnknownSessionError: there is no such session.
        """
        request = pb.EndSessionRequest(session_id=session_id)
        with named_errors(self._target):
            return self._stub.EndSession(request, timeout=self._timeout, metadata=self._metadata).turns

    def cluster_state(self) -> ClusterState:
        """A snapshot of the queue, the attached pipelines and their memory."""
        request = pb.GetClusterStateRequest()
        with named_errors(self._target):
            message = self._stub.GetClusterState(request, timeout=self._timeout, metadata=self._metadata)
        return cluster_state_from_message(message)

    def close(self) -> None:
        """Disconnects and cancels what is running; the client is of no use afterwards."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
