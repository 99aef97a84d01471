"""What bodies say of a reply beside its prompt."""

from collections.abc import Sequence
from typing import Literal

from cluster.http.bodies import CompressionBody, Shared
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Constraint, Priority, Sampling, Stopping
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import (
    compression_to_message,
    constraint_to_message,
    priority_to_message,
    sampling_to_message,
    stopping_to_message,
)

# What is the deployment's where a body is silent.
SILENT: tuple[Literal["temperature", "top_p", "top_k", "min_p", "repetition_penalty"], ...]
SILENT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# All that bodies say of drawing, by the names of ``Sampling``.
DRAWING = (*SILENT, "presence_penalty", "frequency_penalty", "logit_bias", "seed")


def settings_of(
    body: Shared, max_tokens: int | None, constraint: Constraint | None, logprobs: int | None = None
) -> pb.GenerateRequest:
    """All but the prompt and the name. Raises InvalidRequestError."""
    asked = pb.GenerateRequest(
        sampling=_sampling(body, logprobs),
        stopping=stopping_to_message(_stopping(body, max_tokens)),
        constraint=constraint_to_message(constraint),
        session_id=body.session_id or "",
        priority=priority_to_message(_priority(body.priority)),
    )
    if body.compression or body.recall:
        asked.compression.CopyFrom(_compression(body.compression or CompressionBody(), body.recall))
    return asked


def _sampling(body: Shared, logprobs: int | None) -> pb.Sampling:
    said = {name: value for name in DRAWING if (value := getattr(body, name)) is not None}
    if body.top_k is not None and body.top_k <= 0:
        del said["top_k"]
    message = sampling_to_message(Sampling(**said, logprobs=logprobs))
    for name in SILENT:
        if getattr(body, name) is None:
            message.ClearField(name)
    return message


def _stopping(body: Shared, max_tokens: int | None) -> Stopping:
    ends = body.stop_token_ids
    return Stopping(
        max_tokens=max_tokens,
        stop=body.stop or (),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=() if ends is None else whole_ids([ends] if isinstance(ends, int) else ends),
        min_tokens=body.min_tokens or 0,
        include_stop=bool(body.include_stop_str_in_output),
    )


def _compression(body: CompressionBody, recall: str | None) -> pb.Compression:
    if recall and body.recall and recall != body.recall:
        raise InvalidRequestError(
            f"recall is {recall!r:.40}, and that of compression {body.recall!r:.40}; give one of them"
        )
    return compression_to_message(
        Compression(
            policy=body.policy or "",
            prefill=body.prefill or "",
            kv_keep=body.kv_keep,
            recall=recall or body.recall or "",
            parameters=body.parameters or {},
            kv_bytes_keep=body.kv_bytes_keep,
        )
    )


def _priority(given: str | int | None) -> Priority:
    if isinstance(given, int):
        return "normal" if given == 0 else "high" if given < 0 else "low"
    return given or "normal"  # type: ignore[return-value]


def whole_ids(ids: Sequence[int]) -> list[int]:
    """Ids of the wire. Raises InvalidRequestError."""
    for each in ids:
        if not 0 <= each < 2**31:
            raise InvalidRequestError(f"token id {each} is none; ids are 0 to {2**31 - 1}")
    return list(ids)
