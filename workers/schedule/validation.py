"""Refuses what cannot run, and fills in what a request leaves open."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Sampling, Stopping
from workers.model.config import ModelConfig
from workers.policies.registry import validate

DEFAULT_MAX_TOKENS = 256
MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 256


@dataclass(frozen=True)
class Terms:
    """Sampling with its seed and stopping with its ``max_tokens``, valid for one prompt."""

    sampling: Sampling
    stopping: Stopping


def settle(
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stopping: Stopping,
    compression: Compression,
    output_ids: Sequence[int],
    model: ModelConfig,
) -> Terms:
    """Checks a request against the model and settles seed and ``max_tokens``.

    Args:
        output_ids: output that the client has already.

    Raises:
        InvalidRequestError: naming the value and the way out.
    """
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty; give at least one token")
    for name, ids in (("prompt", prompt_ids), ("resume_output_ids", output_ids)):
        for token in ids:
            if not 0 <= token < model.vocabulary:
                raise InvalidRequestError(
                    f"token id {token} in {name} is out of range; ids go from 0 to {model.vocabulary - 1}"
                )
    room = model.context - len(prompt_ids)
    if room < 1:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_ids)} tokens; the model's context is {model.context}, "
            "so at most one less fits"
        )
    validate_sampling(sampling)
    validate_stopping(stopping)
    validate(compression)
    max_tokens = stopping.max_tokens or min(DEFAULT_MAX_TOKENS, room)
    if max_tokens > room:
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}, but behind a prompt of {len(prompt_ids)} tokens the context of "
            f"{model.context} has room for {room}"
        )
    if len(output_ids) > max_tokens:
        raise InvalidRequestError(
            f"resume_output_ids has {len(output_ids)} tokens, more than max_tokens {max_tokens}"
        )
    if sampling.seed is None:
        if output_ids and sampling.temperature > 0:
            raise InvalidRequestError(
                "resume_output_ids with a temperature needs the seed that the first stream reported"
            )
        sampling = replace(sampling, seed=secrets.randbits(63))
    return Terms(sampling, replace(stopping, max_tokens=max_tokens))


def validate_sampling(sampling: Sampling) -> None:
    """Raises InvalidRequestError."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidRequestError(f"temperature is {temperature}; it must be finite and 0 or more")
    if not 0 < top_p <= 1:
        raise InvalidRequestError(f"top_p is {top_p}; it must be in (0, 1]")
    if top_k is not None and top_k < 1:
        raise InvalidRequestError(f"top_k is {top_k}; it must be 1 or more, or absent for all")


def validate_stopping(stopping: Stopping) -> None:
    """Raises InvalidRequestError."""
    if stopping.max_tokens is not None and stopping.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {stopping.max_tokens}; it must be 1 or more")
    if len(stopping.stop) > MOST_STOP_STRINGS:
        raise InvalidRequestError(
            f"{len(stopping.stop)} stop strings were given; at most {MOST_STOP_STRINGS} are allowed"
        )
    for stop in stopping.stop:
        if not 1 <= len(stop) <= LONGEST_STOP_STRING:
            raise InvalidRequestError(
                f"stop string {stop[:32]!r} has {len(stop)} characters; "
                f"it must have 1 to {LONGEST_STOP_STRING}"
            )
