"""The blocking client."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from pyramidserve._requests import (
    DEFAULT_TARGET,
    MAX_MESSAGE_BYTES,
    Access,
    Prompt,
    RequestOptions,
    assemble,
    channel_options,
    generate_request,
    named_errors,
)
from pyramidserve.types import ChatMessage, ClusterState, Event, Reply
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import InferenceStub
from pyramidserve.wire import cluster_state_from_message, error_from_rpc, event_from_message


class ReplyStream(Iterator[Event]):
    """The events of one reply as they come: Started, any number of Tokens, Receipt.

    Closing it, or leaving its ``with`` block, cancels the request wherever it is; iteration then
    ends. Iterating raises the errors of ``pyramidserve.errors``.

    Attributes:
        request_id: the request; sending it again joins the running reply.
    """

    def __init__(
        self, call: "grpc._CallIterator[pb.GenerateResponse]", target: str, request_id: str
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._target = target
        self._closed = False

    def __next__(self) -> Event:
        if self._closed:
            raise StopIteration
        try:
            return event_from_message(next(self._call))
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise error_from_rpc(error, self._target) from error

    def close(self) -> None:
        """Cancels the request unless the reply is complete; may be called from any thread."""
        self._closed = True
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
    ) -> None:
        """Connects on first use.

        Args:
            target: "host:port" of the router.
            timeout: seconds that any call may take in all; None sets no limit.
            max_message_bytes: bytes that one message may have, either way.
            token: names the tenant, where the cluster wants one.
            certificate: PEM of the authority that TLS is to trust, or of the router itself; without it
                there is no TLS.
        """
        self._target = target
        self._timeout = timeout
        self._max_message_bytes = max_message_bytes
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
        request = generate_request(prompt, self._max_message_bytes, **options)
        seconds = self._timeout if timeout is None else timeout
        call = self._stub.Generate(request, timeout=seconds, metadata=self._metadata)
        return ReplyStream(call, self._target, request.request_id)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> Reply:
        """Waits for the whole reply; see ``stream``.

        ``Reply.token_ids`` and ``Reply.text`` hold what is new, without ``resume_output_ids``.
        """
        with self.stream(prompt, timeout=timeout, **options) as events:
            return assemble(events)

    def chat(
        self,
        messages: Sequence[ChatMessage],
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
