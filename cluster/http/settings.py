"""What bodies say of a reply beside its prompt."""

from collections.abc import Sequence
from typing import Literal, TypedDict

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


class Drawing(TypedDict):
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    min_p: float


def drawing(body: Shared) -> Drawing:
    """What all bodies say of sampling."""
    return {
        "temperature": body.temperature or 0.0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": body.top_k if body.top_k and body.top_k > 0 else None,
        "seed": body.seed,
        "min_p": body.min_p or 0.0,
    }


def stopping_of(body: Shared, max_tokens: int | None) -> Stopping:
    """What all bodies say of the end."""
    ends = body.stop_token_ids
    return Stopping(
        max_tokens=max_tokens,
        stop=body.stop or (),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=() if ends is None else whole_ids([ends] if isinstance(ends, int) else ends),
    )


def settings_of(
    body: Shared, sampling: Sampling, stopping: Stopping, constraint: Constraint | None
) -> pb.GenerateRequest:
    """All but the prompt and the name."""
    drawn = sampling_to_message(sampling)
    for name in SILENT:
        if getattr(body, name, None) is None:
            drawn.ClearField(name)
    asked = pb.GenerateRequest(
        sampling=drawn,
        stopping=stopping_to_message(stopping),
        constraint=constraint_to_message(constraint),
        session_id=body.session_id or "",
        priority=priority_to_message(_priority(body.priority)),
    )
    if body.compression or body.recall:
        asked.compression.CopyFrom(_compression(body.compression or CompressionBody(), body.recall))
    return asked


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
