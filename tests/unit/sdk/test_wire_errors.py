"""Errors keep their names across the wire."""

import grpc
import pytest

from pyramidserve import wire
from pyramidserve.errors import (
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PyramidServeError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServerLeftError,
    UnavailableError,
    UnknownSessionError,
)
from pyramidserve.wire.error import ERROR_DETAIL_KEY, STATUS

TARGET = "router.example:8700"


def failure(
    status: grpc.StatusCode, details: str = "", error: PyramidServeError | None = None
) -> grpc.RpcError:
    pairs = wire.error_to_metadata(error) if error else ()
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(status, nothing, grpc.aio.Metadata(*pairs), details)


@pytest.mark.parametrize("kind", STATUS)
def test_errors_arrive_by_name(kind: type[PyramidServeError]) -> None:
    for error in (kind("so it is"), kind("so it is", reason="odd", retry_delay=0.0)):
        arrived = wire.error_from_rpc(failure(STATUS[kind], "details", error), TARGET)
        assert isinstance(error, type(arrived))
        assert vars(arrived) == vars(error)
    assert type(wire.error_from_rpc(failure(STATUS[kind], error=kind("")), TARGET)) is kind


def test_an_unknown_reason_is_the_general_error_of_its_status() -> None:
    odd = RequestTooLargeError("too long", reason="odd")
    arrived = wire.error_from_rpc(failure(STATUS[RequestTooLargeError], error=odd), TARGET)
    assert type(arrived) is InvalidRequestError
    assert arrived.reason == "odd"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, UnknownSessionError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, RequestTimeoutError),
        (grpc.StatusCode.CANCELLED, ServerLeftError),
        (grpc.StatusCode.INTERNAL, EngineError),
        (grpc.StatusCode.UNIMPLEMENTED, EngineError),
        (grpc.StatusCode.UNKNOWN, EngineError),
    ],
)
def test_errors_without_detail_go_by_their_status(
    status: grpc.StatusCode, kind: type[PyramidServeError]
) -> None:
    error = wire.error_from_rpc(failure(status, "as it went"), TARGET)
    assert type(error) is kind
    assert TARGET in error.message
    assert error.reason == kind.reason


def test_a_message_over_the_limit_is_the_request_at_fault() -> None:
    details = "SERVER: Received message larger than max (2003 vs. 1000)"
    error = wire.error_from_rpc(failure(grpc.StatusCode.RESOURCE_EXHAUSTED, details), TARGET)
    assert type(error) is InvalidRequestError
    assert "2003 vs. 1000" in error.message
    assert "shorten" in error.message


def test_long_messages_are_cut_to_what_metadata_takes() -> None:
    ((key, value),) = wire.error_to_metadata(EngineError("\N{GRINNING FACE}" * 100_000))
    assert key == ERROR_DETAIL_KEY
    assert 0 < len(value) < 8192
