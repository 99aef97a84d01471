"""Errors, to and from a gRPC status with its trailing metadata: the one place where they meet gRPC."""

from collections.abc import Iterable
from typing import Any

import grpc

from pyramidserve.errors import (
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PyramidServeError,
    RequestCancelledError,
    RequestConflictError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServerLeftError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
)
from pyramidserve.v1 import inference_pb2 as pb

# Servers read it forwards, clients backwards.
STATUS: dict[type[PyramidServeError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    RequestTooLargeError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    RequestConflictError: grpc.StatusCode.ALREADY_EXISTS,
    UnknownSessionError: grpc.StatusCode.NOT_FOUND,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    ServerLeftError: grpc.StatusCode.UNAVAILABLE,
    RequestTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    EngineError: grpc.StatusCode.INTERNAL,
    ConfigurationError: grpc.StatusCode.FAILED_PRECONDITION,
}

# Trailing metadata that carries a serialised ErrorDetail beside the status.
ERROR_DETAIL_KEY = "pyramidserve-error-bin"

# gRPC refuses more than 8 KiB of metadata, status included, and with it the error itself.
_DETAIL_CHARACTERS = 800
# A server that does not answer says nothing about when it will.
_UNAVAILABLE_RETRY_DELAY = 1.0
# What gRPC says of calls that this side has ended.
_CANCELLED_BY_US = ("Channel closed", "Locally cancelled")
# Another may have its place already.
_LEFT_RETRY_DELAY = 0.2


def error_to_metadata(error: PyramidServeError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that carries ``error`` beside its status; long messages are cut."""
    detail = pb.ErrorDetail(
        reason=error.reason,
        message=error.message[:_DETAIL_CHARACTERS],
        retry_delay_seconds=error.retry_delay,
    )
    return ((ERROR_DETAIL_KEY, detail.SerializeToString()),)


def error_from_rpc(error: grpc.RpcError, target: str) -> PyramidServeError:
    """The named error behind a failed call to ``target``, blocking or asyncio.

    The server's own reason, message and retry delay where it sent them, else what the status says.
    """
    detail = _detail(error)
    if detail is None:
        return _undetailed(error.code(), error.details() or "no details", target)
    return _named(error.code(), detail.reason)(
        detail.message,
        reason=detail.reason,
        retry_delay=detail.retry_delay_seconds if detail.HasField("retry_delay_seconds") else None,
    )


def _detail(error: grpc.RpcError) -> pb.ErrorDetail | None:
    # Blocking calls have named tuples and asyncio ones a Metadata; both yield pairs.
    metadata: Iterable[Any] = error.trailing_metadata() or ()
    serialized = dict(metadata).get(ERROR_DETAIL_KEY)
    return None if serialized is None else pb.ErrorDetail.FromString(serialized)


def _named(status: grpc.StatusCode, reason: str) -> type[PyramidServeError]:
    """The error of ``status`` with this reason, else the most general one of ``status``."""
    candidates = [kind for kind, code in STATUS.items() if code is status] or [EngineError]
    general = min(candidates, key=lambda kind: len(kind.__mro__))
    return next((kind for kind in candidates if kind.reason == reason), general)


def _undetailed(status: grpc.StatusCode, details: str, target: str) -> PyramidServeError:
    kind = _named(status, "")
    if "message larger than max" in details:
        return InvalidRequestError(
            f"a message is over the size limit ({details}): shorten the request, or raise the "
            "limit of client and server",
            reason="message_too_large",
        )
    if kind is UnavailableError:
        return UnavailableError(
            f"no server answers at {target}: {details}", retry_delay=_UNAVAILABLE_RETRY_DELAY
        )
    by_us = any(words in details for words in _CANCELLED_BY_US)
    if status is grpc.StatusCode.CANCELLED and not by_us:  # as a server does that stops
        return ServerLeftError(
            f"{target} was going away as the call came: {details}", retry_delay=_LEFT_RETRY_DELAY
        )
    if kind is RequestTimeoutError:
        return RequestTimeoutError(f"the timeout passed before {target} had answered in full")
    return kind(f"{target}: {details}")
