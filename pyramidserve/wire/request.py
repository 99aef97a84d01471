"""What a request says about sampling, stopping and compression, to and from its messages."""

from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pyramidserve.errors import InvalidRequestError
from pyramidserve.integers import INT32_MAX, whole_number
from pyramidserve.types import (
    Compression,
    Priority,
    PyramidParameters,
    Sampling,
    Stopping,
    StreamingParameters,
)
from pyramidserve.v1 import inference_pb2 as pb

_Message = TypeVar("_Message", bound=Message)

_PRIORITY_TO_MESSAGE: dict[Priority, pb.Priority.ValueType] = {
    "normal": pb.PRIORITY_NORMAL,
    "high": pb.PRIORITY_HIGH,
    "low": pb.PRIORITY_LOW,
}
_PRIORITY_FROM_MESSAGE = {message: priority for priority, message in _PRIORITY_TO_MESSAGE.items()}
# Every int32 of a request is a count; its one int64 is the seed.
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (0, INT32_MAX),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
}


def priority_to_message(priority: Priority) -> "pb.Priority.ValueType":
    """The message of ``priority``.

    Raises:
        InvalidRequestError: there is no such priority.
    """
    if priority not in _PRIORITY_TO_MESSAGE:
        known = ", ".join(_PRIORITY_TO_MESSAGE)
        raise InvalidRequestError(f"priority is {priority!r:.40}; it must be one of {known}")
    return _PRIORITY_TO_MESSAGE[priority]


def priority_from_message(message: int) -> Priority:
    """What ``message`` asks for.

    Raises:
        InvalidRequestError: it is newer than this package.
    """
    for known, priority in _PRIORITY_FROM_MESSAGE.items():
        if known == message:
            return priority
    raise InvalidRequestError(f"priority is {message}; it must be one of {sorted(_PRIORITY_FROM_MESSAGE)}")


def sampling_to_message(sampling: Sampling) -> pb.Sampling:
    """The message of ``sampling``.

    Raises:
        InvalidRequestError: a whole number does not fit the wire.
    """
    return _message(pb.Sampling, sampling)


def sampling_from_message(message: pb.Sampling) -> Sampling:
    """What ``message`` asks for; absent fields have their defaults."""
    return Sampling(**_present(message))


def stopping_to_message(stopping: Stopping) -> pb.Stopping:
    """The message of ``stopping``.

    Raises:
        InvalidRequestError: ``max_tokens`` does not fit the wire.
    """
    return _message(pb.Stopping, stopping)


def stopping_from_message(message: pb.Stopping) -> Stopping:
    """What ``message`` asks for; absent fields have their defaults."""
    return Stopping(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def compression_to_message(compression: Compression) -> pb.Compression:
    """The message of ``compression``.

    Raises:
        InvalidRequestError: a whole number does not fit the wire.
    """
    pyramid, streaming = compression.pyramid, compression.streaming
    return pb.Compression(
        policy=compression.policy,
        prefill=compression.prefill,
        kv_keep=compression.kv_keep,
        pyramid=_message(pb.PyramidParameters, pyramid) if pyramid else None,
        streaming=_message(pb.StreamingParameters, streaming) if streaming else None,
        recall=compression.recall,
    )


def compression_from_message(message: pb.Compression, default: Compression) -> Compression:
    """What ``message`` asks for.

    An absent message is ``default``. An empty policy, prefill or recall is that of ``default``; the
    fraction and the knobs of ``default`` hold only where the message names no policy, fraction or
    knobs of its own.
    """
    prefill, recall = message.prefill or default.prefill, message.recall or default.recall
    knobs = {name: message.HasField(name) for name in ("kv_keep", "pyramid", "streaming")}
    if not message.policy and not any(knobs.values()):
        return replace(default, prefill=prefill, recall=recall)
    return Compression(
        policy=message.policy or default.policy,
        prefill=prefill,
        kv_keep=message.kv_keep if knobs["kv_keep"] else None,
        pyramid=PyramidParameters(**_present(message.pyramid)) if knobs["pyramid"] else None,
        streaming=StreamingParameters(**_present(message.streaming)) if knobs["streaming"] else None,
        recall=recall,
    )


def _message(kind: type[_Message], source: object) -> _Message:
    values = dict(vars(source))
    for field in kind.DESCRIPTOR.fields:
        if field.cpp_type in _RANGES and not field.is_repeated and values[field.name] is not None:
            low, high = _RANGES[field.cpp_type]
            values[field.name] = whole_number(field.name, values[field.name], low, high)
    return kind(**values)


def _present(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
