"""The client of PyramidServe: replies, sessions and the state of a cluster.

What talks to a server is loaded when it is asked for, and with it grpc; types and errors need nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pyramidserve.errors import (
    CheckpointError,
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    PortInUseError,
    PyramidServeError,
    RequestCancelledError,
    RequestConflictError,
    RequestTimeoutError,
    RequestTooLargeError,
    ServerLeftError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
    UnschedulableError,
)
from pyramidserve.tools import Tool, ToolCall, ToolCallPart
from pyramidserve.types import (
    ChatMessage,
    ClusterState,
    Compression,
    Constraint,
    DeviceBytes,
    Event,
    FinishReason,
    LayerReceipt,
    PipelineState,
    Receipt,
    Reply,
    Role,
    Sampling,
    StageState,
    Started,
    Stopping,
    TokenLogprob,
    Tokens,
)

if TYPE_CHECKING:
    from pyramidserve._requests import DEFAULT_TARGET, RequestOptions
    from pyramidserve.aio import AsyncClient, AsyncReplyStream
    from pyramidserve.client import Client, ReplyStream
    from pyramidserve.prompt import Prompt
    from pyramidserve.wire.connection import MAX_MESSAGE_BYTES

    __version__: str

__all__ = [
    "DEFAULT_TARGET",
    "MAX_MESSAGE_BYTES",
    "AsyncClient",
    "AsyncReplyStream",
    "ChatMessage",
    "CheckpointError",
    "Client",
    "ClusterState",
    "Compression",
    "ConfigurationError",
    "Constraint",
    "DeviceBytes",
    "EngineError",
    "Event",
    "FinishReason",
    "InvalidRequestError",
    "LayerReceipt",
    "OverloadedError",
    "PipelineState",
    "PortInUseError",
    "Prompt",
    "PyramidServeError",
    "Receipt",
    "Reply",
    "ReplyStream",
    "RequestCancelledError",
    "RequestConflictError",
    "RequestOptions",
    "RequestTimeoutError",
    "RequestTooLargeError",
    "Role",
    "Sampling",
    "ServerLeftError",
    "StageState",
    "Started",
    "Stopping",
    "TokenLogprob",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolCallPart",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownSessionError",
    "UnschedulableError",
    "__version__",
]

_HOMES = {
    "_requests": ("DEFAULT_TARGET", "RequestOptions"),
    "aio": ("AsyncClient", "AsyncReplyStream"),
    "client": ("Client", "ReplyStream"),
    "prompt": ("Prompt",),
    "wire.connection": ("MAX_MESSAGE_BYTES",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("pyramidserve")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"pyramidserve.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
