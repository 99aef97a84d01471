"""The errors of PyramidServe, client and server side, and their gRPC status (``wire/error.py``).

PyramidServeError
├── InvalidRequestError        INVALID_ARGUMENT     the request is wrong; change it
│   └── RequestTooLargeError   INVALID_ARGUMENT     no pipeline could ever hold it
├── UnauthenticatedError       UNAUTHENTICATED      the token is missing or unknown
├── RequestConflictError       ALREADY_EXISTS       request_id is live with other content
├── UnknownSessionError        NOT_FOUND            no such session
├── OverloadedError            RESOURCE_EXHAUSTED   the queue is full; try again after retry_delay
├── UnavailableError           UNAVAILABLE          no server or pipeline; try again after retry_delay
│   └── ServerLeftError        UNAVAILABLE          the server was going away and has not taken the call
├── RequestTimeoutError        DEADLINE_EXCEEDED    the client's deadline has passed, or could not be met
├── RequestCancelledError      CANCELLED            the stream was closed
├── EngineError                INTERNAL             the server failed
└── ConfigurationError         FAILED_PRECONDITION  the deployment is wrong; change it
    ├── CheckpointError        the checkpoint is missing, damaged or of another architecture
    ├── PortInUseError         another process listens there
    └── UnschedulableError     the cluster lacks a resource that the gang needs
"""


class PyramidServeError(Exception):
    """Base of all errors.

    Attributes:
        reason: a stable word for programs, as in ``queue_full``.
        retry_delay: seconds after which trying again makes sense; None: trying again will not help.
    """

    reason = "error"

    def __init__(
        self, message: str, *, reason: str | None = None, retry_delay: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.retry_delay = retry_delay


class InvalidRequestError(PyramidServeError):
    reason = "invalid_request"


class RequestTooLargeError(InvalidRequestError):
    reason = "request_too_large"


class UnauthenticatedError(PyramidServeError):
    reason = "unauthenticated"


class RequestConflictError(PyramidServeError):
    reason = "request_conflict"


class UnknownSessionError(PyramidServeError):
    reason = "unknown_session"


class OverloadedError(PyramidServeError):
    reason = "queue_full"


class UnavailableError(PyramidServeError):
    reason = "unavailable"


class ServerLeftError(UnavailableError):
    reason = "server_left"


class RequestTimeoutError(PyramidServeError):
    reason = "deadline_exceeded"


class RequestCancelledError(PyramidServeError):
    reason = "cancelled"


class EngineError(PyramidServeError):
    reason = "engine_error"


def not_finite(request_id: str) -> EngineError:
    """What ends a request whose logits are not finite."""
    return EngineError(
        f"the model's output for request {request_id!r} is not a number (NaN or infinite); that is the "
        "checkpoint's fault or that of its dtype: try dtype float32, or another checkpoint",
        reason="not_finite",
    )


def policy_failed(request_id: str, why: str) -> EngineError:
    """What ends a request whose compression policy failed."""
    return EngineError(
        f"the compression policy of request {request_id!r} failed: {why}; that is the policy's fault: ask "
        "for another, or mend it",
        reason="policy_failed",
    )


class ConfigurationError(PyramidServeError):
    reason = "configuration"


class CheckpointError(ConfigurationError):
    reason = "checkpoint"


class PortInUseError(ConfigurationError):
    reason = "port_in_use"


class UnschedulableError(ConfigurationError):
    reason = "unschedulable"
