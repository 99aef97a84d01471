"""Errors in OpenAI's shape, with their HTTP status."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from pyramidserve.errors import (
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PyramidServeError,
    RequestCancelledError,
    RequestConflictError,
    RequestTimeoutError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
)

# The first that an error is one of.
STATUS: tuple[tuple[type[PyramidServeError], int, str], ...] = (
    (InvalidRequestError, 400, "invalid_request_error"),
    (UnauthenticatedError, 401, "authentication_error"),
    (UnknownSessionError, 404, "not_found_error"),
    (RequestTimeoutError, 408, "timeout_error"),
    (RequestConflictError, 409, "conflict_error"),
    (OverloadedError, 429, "rate_limit_error"),
    (RequestCancelledError, 499, "cancelled_error"),
    (UnavailableError, 503, "service_unavailable_error"),
    (ConfigurationError, 500, "server_error"),
    (EngineError, 500, "server_error"),
)
# Of requests that are wrong in a way that HTTP has a word for.
BY_REASON = {
    "model_not_found": (404, "not_found_error"),
    "message_too_large": (413, "invalid_request_error"),
    "not_json": (415, "invalid_request_error"),
    "origin_refused": (403, "permission_error"),
}
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
SHOWN = 80  # characters of a value that is wrong


def status_of(error: PyramidServeError) -> tuple[int, str]:
    """The HTTP status of ``error``, and OpenAI's word for its kind."""
    if error.reason in BY_REASON:
        return BY_REASON[error.reason]
    return next((status, kind) for cls, status, kind in STATUS if isinstance(error, cls))


def shape_of(error: PyramidServeError) -> dict[str, Any]:
    """``error`` as OpenAI's clients read it."""
    field = error.message.partition(" ")[0]
    return {
        "error": {
            "message": error.message,
            "type": status_of(error)[1],
            # Messages about a value begin with its name.
            "param": field if isinstance(error, InvalidRequestError) and "_" in field else None,
            "code": error.reason,
        }
    }


def response_of(error: PyramidServeError, headers: Mapping[str, str] = NO_HEADERS) -> JSONResponse:
    """The answer that tells of ``error``, with ``headers`` beside its own."""
    return JSONResponse(shape_of(error), status_of(error)[0], {**_headers(error), **headers})


def _headers(error: PyramidServeError) -> dict[str, str]:
    """When trying again makes sense, as HTTP and OpenAI's clients know it."""
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, UnauthenticatedError) else {}
    if error.retry_delay is None:
        return headers | {"X-Should-Retry": "false"}
    return headers | {
        "Retry-After": str(math.ceil(error.retry_delay)),
        "Retry-After-Ms": str(math.ceil(1000 * error.retry_delay)),
    }


def wrong_body(error: ValidationError) -> InvalidRequestError:
    """What is wrong with a body, naming the first value that is."""
    # Of a value that may be of several types, the one that it fits furthest.
    first = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {first['msg']}")
    # Of a value that may be of several types, what it was taken for is between the names.
    names = [str(each) for each in first["loc"] if not (isinstance(each, str) and "[" in each)]
    place = ".".join(name for name in names if name not in ("str", "int", "float", "bool"))
    if first["type"] == "missing":
        return InvalidRequestError(f"{place} is missing; the request needs it")
    return InvalidRequestError(f"{place} is {first['input']!r:.{SHOWN}}: {first['msg']}")
