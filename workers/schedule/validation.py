"""Refuses what cannot run, and fills in what a request leaves open."""

import math
import secrets
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Sampling, Stopping
from workers.budget.plan import KeepPlan
from workers.model.config import ModelConfig
from workers.policies.registry import plan, recall
from workers.policies.settled import settled
from workers.policies.valid import validate

# Of a reply whose length nobody has limited, until it is known how long they become.
EXPECTED_TOKENS = 256
# Prompt and output of a sequence that outgrows the context: router and head keep its ids while it runs.
LONGEST_SEQUENCE = 1 << 20
MOST_STOPS = 16
MOST_LOGPROBS = 20
MOST_BIASES, MOST_BIAS = 1024, 100
LONGEST_STOP_STRING = 256


@dataclass(frozen=True)
class Terms:
    """Sampling with its seed, stopping with its ``max_tokens``, and compression, valid for one prompt.

    ``limited``: the request has chosen ``max_tokens``; else they are what the context has room for, beside
    the prompt or what stays of it.
    """

    sampling: Sampling
    stopping: Stopping
    compression: Compression
    limited: bool

    @property
    def expected_tokens(self) -> int:
        """How long the reply will probably be; 0: as long as it may be."""
        return 0 if self.limited else EXPECTED_TOKENS


def settle(
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stopping: Stopping,
    compression: Compression,
    output_ids: Sequence[int],
    model: ModelConfig,
    given_ids: Sequence[int] = (),
    kv_dtype: str = "bfloat16",
) -> Terms:
    """Checks a request against the model and settles seed, ``max_tokens`` and what stays.

    Args:
        output_ids: output that the client has already.
        given_ids: output that is given, that which it has already included.
        kv_dtype: in what KV is stored, one of KV_FORMATS.

    Raises:
        InvalidRequestError: naming the value and the way out.
    """
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty; give at least one token")
    given = (
        ("prompt", prompt_ids),
        ("resume_output_ids", output_ids),
        ("given_output_ids", given_ids),
        ("stop_token_ids", stopping.stop_token_ids),
    )
    for name, ids in given:
        for token in ids:
            if not 0 <= token < model.vocabulary:
                raise InvalidRequestError(
                    f"token id {token} in {name} is out of range; ids go from 0 to {model.vocabulary - 1}"
                )
    validate(compression)
    compression = settled(compression, model, kv_dtype, len(prompt_ids))
    keep = plan(compression, len(prompt_ids), model.layers)
    outgrows = keep.within_cache and keep.held <= model.context
    longest, bound = longest_sequence(model, outgrows and recall(compression) == "off")
    if len(prompt_ids) >= longest:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_ids)} tokens; {bound} is {longest}, so at most one less fits"
            f"{_way_out(compression, keep, model)}"
        )
    validate_sampling(sampling, model.vocabulary)
    validate_stopping(stopping)
    if any(model.windows) and keep.heads == "each":
        raise InvalidRequestError(
            f"policy {compression.policy!r} has heads 'each', but layers of this model have windows, which "
            "need the same tokens in all heads; ask for heads 'all'"
        )
    longest, _ = longest_sequence(model, outgrows)
    room = longest - len(prompt_ids)
    max_tokens = stopping.max_tokens or min(room, model.context - max(keep.kept) if outgrows else room)
    if max_tokens > room:
        there = "a sequence" if outgrows else "the context"
        way_out = "" if outgrows else _way_out(compression, keep, model)
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}, but behind a prompt of {len(prompt_ids)} tokens {there} of "
            f"{longest} has room for {room}{way_out}"
        )
    if len(output_ids) > max_tokens:
        raise InvalidRequestError(
            f"resume_output_ids has {len(output_ids)} tokens, more than max_tokens {max_tokens}"
        )
    if len(given_ids) > max_tokens:
        raise InvalidRequestError(
            f"given_output_ids has {len(given_ids)} tokens, more than max_tokens {max_tokens}"
        )
    common = min(len(given_ids), len(output_ids))
    if list(given_ids[:common]) != list(output_ids[:common]):
        raise InvalidRequestError(
            "resume_output_ids and given_output_ids begin with other ids; send what the streams brought"
        )
    if sampling.seed is None:
        if output_ids and sampling.temperature > 0:
            raise InvalidRequestError(
                "resume_output_ids with a temperature needs the seed that the first stream reported"
            )
        sampling = replace(sampling, seed=secrets.randbits(63))
    limited = stopping.max_tokens is not None
    return Terms(sampling, replace(stopping, max_tokens=max_tokens), compression, limited)


def longest_sequence(model: ModelConfig, outgrows: bool) -> tuple[int, str]:
    """The most tokens of prompt and output, and what bounds them; ``outgrows``: not the context."""
    if outgrows and model.context < LONGEST_SEQUENCE:
        return LONGEST_SEQUENCE, "the longest sequence"
    return model.context, "the model's context"


def may_outgrow(compression: Compression, model: ModelConfig, kv_dtype: str) -> bool:
    """Whether some sequence of ``compression`` may have more tokens than the context.

    Raises InvalidRequestError where it is not valid.
    """
    validate(compression)
    return plan(settled(compression, model, kv_dtype, 1), 1, model.layers).within_cache


def _way_out(compression: Compression, keep: KeepPlan, model: ModelConfig) -> str:
    """How a sequence may have more tokens than the context, where its policy knows a way."""
    if not keep.within_cache:
        return ""
    name = f"; policy {compression.policy!r} goes beyond it"
    if keep.held > model.context:
        return f"{name} where layers hold at most as many, and they hold {keep.held}: ask for fewer"
    return f"{name} with recall 'off'" if recall(compression) != "off" else ""


class Stops(Protocol):
    """A request whose ``stopping`` has its ``max_tokens``; a frozen dataclass."""

    @property
    def stopping(self) -> Stopping: ...

    @property
    def max_tokens(self) -> int: ...


Request = TypeVar("Request", bound=Stops)


def lowered(request: Request, fits: Callable[[Request], bool]) -> Request:
    """``request`` with as many ``max_tokens``, of those that it has, as fit; itself where none do."""

    def at_most(max_tokens: int) -> Request:
        changed: Request = replace(request, stopping=replace(request.stopping, max_tokens=max_tokens))  # type: ignore[type-var]
        return changed

    if fits(request) or not fits(at_most(1)):
        return request
    too_many = bisect_left(range(1, request.max_tokens), True, key=lambda most: not fits(at_most(most)))
    return at_most(too_many)


def validate_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raises InvalidRequestError."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidRequestError(f"temperature is {temperature}; it must be finite and 0 or more")
    if not 0 < top_p <= 1:
        raise InvalidRequestError(f"top_p is {top_p}; it must be in (0, 1]")
    if top_k is not None and top_k < 1:
        raise InvalidRequestError(f"top_k is {top_k}; it must be 1 or more, or absent for all")
    for name, least, most in (("min_p", 0, 1), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)):
        if not least <= getattr(sampling, name) <= most:
            raise InvalidRequestError(f"{name} is {getattr(sampling, name)}; it must be {least} to {most}")
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise InvalidRequestError(
            f"repetition_penalty is {sampling.repetition_penalty}; it must be finite and above 0"
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MOST_LOGPROBS:
        raise InvalidRequestError(f"logprobs is {sampling.logprobs}; it must be 0 to {MOST_LOGPROBS}")
    if len(sampling.logit_bias) > MOST_BIASES:
        raise InvalidRequestError(
            f"logit_bias has {len(sampling.logit_bias)} ids; at most {MOST_BIASES} are allowed"
        )
    for token, bias in dict(sampling.logit_bias).items():
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(
                f"logit_bias has token id {token}; the model's are 0 to {vocabulary - 1}"
            )
        if not abs(bias) <= MOST_BIAS:
            raise InvalidRequestError(
                f"logit_bias of token id {token} is {bias}; it must be {-MOST_BIAS} to {MOST_BIAS}"
            )


def validate_stopping(stopping: Stopping) -> None:
    """Raises InvalidRequestError."""
    if stopping.max_tokens is not None and stopping.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {stopping.max_tokens}; it must be 1 or more")
    if not 0 <= stopping.min_tokens <= (stopping.max_tokens or stopping.min_tokens):
        most = "" if stopping.max_tokens is None else f" and at most max_tokens, {stopping.max_tokens}"
        raise InvalidRequestError(f"min_tokens is {stopping.min_tokens}; it must be 0 or more{most}")
    for name, stops in (("stop strings", stopping.stop), ("stop_token_ids", stopping.stop_token_ids)):
        if len(stops) > MOST_STOPS:
            raise InvalidRequestError(f"{len(stops)} {name} were given; at most {MOST_STOPS} are allowed")
    for stop in stopping.stop:
        if not 1 <= len(stop) <= LONGEST_STOP_STRING:
            raise InvalidRequestError(
                f"stop string {stop[:32]!r} has {len(stop)} characters; "
                f"it must have 1 to {LONGEST_STOP_STRING}"
            )
