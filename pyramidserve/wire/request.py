"""What a request says about sampling, stopping and compression, to and from its messages."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pyramidserve.errors import InvalidRequestError
from pyramidserve.integers import INT32_MAX, whole_number
from pyramidserve.types import Compression, Constraint, Parameter, Priority, Sampling, Stopping
from pyramidserve.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from pyramidserve.v1.pipeline_pb2 import StartSequence

GREEDY = Sampling()
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


def sampling_from_message(message: pb.Sampling, default: Sampling = GREEDY) -> Sampling:
    """What ``message`` asks for; absent fields are those of ``default``."""
    return replace(default, **_present(message) | {"logit_bias": dict(message.logit_bias)})


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
        min_tokens=message.min_tokens,
        include_stop=message.include_stop,
    )


def constraint_to_message(constraint: Constraint | None) -> pb.Constraint | None:
    """The message of ``constraint``; None of none."""
    return pb.Constraint(kind=constraint.kind, text=constraint.text) if constraint else None


def constraint_from_message(message: "pb.GenerateRequest | StartSequence") -> Constraint | None:
    """What a request is held to, if to anything."""
    if not message.HasField("constraint"):
        return None
    return Constraint(message.constraint.kind, message.constraint.text)


def compression_to_message(compression: Compression) -> pb.Compression:
    """The message of ``compression``.

    Raises:
        InvalidRequestError: the value of a knob does not fit the wire.
    """
    message = pb.Compression(
        policy=compression.policy,
        prefill=compression.prefill,
        kv_keep=compression.kv_keep,
        recall=compression.recall,
        kv_bytes_keep=compression.kv_bytes_keep,
    )
    if compression.parameters:
        message.parameters.update(_parameters(dict(compression.parameters)))
    return message


def compression_from_message(message: pb.Compression, default: Compression) -> Compression:
    """What ``message`` asks for.

    An absent message is ``default``. An empty policy or recall is that of ``default``, and so is an empty
    prefill where the policy is; the fractions and the knobs of ``default`` hold only where the message
    names no policy, fraction or knobs of its own.
    """
    policy, recall = message.policy or default.policy, message.recall or default.recall
    prefill = message.prefill or (default.prefill if policy == default.policy else "")
    told = any(
        message.HasField(name)
        for name in ("kv_keep", "kv_bytes_keep", "pyramid", "streaming", "parameters")
    )
    if not message.policy and not told:
        return replace(default, prefill=prefill, recall=recall)
    return Compression(
        policy=policy,
        prefill=prefill,
        kv_keep=message.kv_keep if message.HasField("kv_keep") else None,
        recall=recall,
        # The first two have knobs of older clients.
        parameters={
            **_present(message.pyramid),
            **_present(message.streaming),
            **_parameters(dict(message.parameters.items())),
        },
        kv_bytes_keep=message.kv_bytes_keep if message.HasField("kv_bytes_keep") else None,
    )


def _parameters(values: Mapping[str, object]) -> dict[str, Parameter]:
    """``values`` as knobs have them. Raises InvalidRequestError, naming the first that no knob can have."""
    parameters: dict[str, Parameter] = {}
    for name, value in values.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            numbers = tuple(value)
            if not all(isinstance(each, int | float) for each in numbers):
                raise InvalidRequestError(f"{name} is {list(numbers)!r:.80}; a list must be of numbers")
            parameters[name] = numbers
        elif isinstance(value, bool | int | float | str):
            parameters[name] = value
        else:
            raise InvalidRequestError(
                f"{name} is {value!r:.80}; it must be a number, a list of numbers, a text, true or false"
            )
    return parameters


def _message(kind: type[_Message], source: object) -> _Message:
    values = dict(vars(source))
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    for field in kind.DESCRIPTOR.fields:
        if field.cpp_type in _RANGES and not field.is_repeated and values[field.name] is not None:
            low, high = _RANGES[field.cpp_type]
            values[field.name] = whole_number(field.name, values[field.name], low, high)
    return kind(**values)


def _present(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
