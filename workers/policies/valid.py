"""Which compressions are valid: requests are told the value that is wrong, and the way out. Pure."""

from typing import get_args

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Parameter, Recall
from workers.budget.kv_share import LEAST_INDEXED
from workers.policies import auto
from workers.policies.budget import BUDGETS
from workers.policies.observed import ends
from workers.policies.policy import counting_knobs, read_knobs
from workers.policies.registry import (
    FLOOR,
    POLICIES,
    TOKENS,
    parameters_of,
    prunes,
)


def validate(compression: Compression) -> None:
    """Raises InvalidRequestError, naming the value and the way out."""
    policy = POLICIES.get(compression.policy)
    if policy is None:
        raise InvalidRequestError(f"unknown policy {compression.policy!r}; known are {', '.join(POLICIES)}")
    shares = {"kv_keep": compression.kv_keep, "kv_bytes_keep": compression.kv_bytes_keep}
    for name, value in shares.items():
        if value is not None and not 0 < value <= 1:
            raise InvalidRequestError(f"{name} is {value}; it must be in (0, 1]")
    knobs, tokens, budget = parameters_of(compression)
    kv_keep, shared = compression.kv_keep, any(value is not None for value in shares.values())
    wanted = {**shares, TOKENS: tokens}
    asked = [f"{name} {value}" for name, value in wanted.items() if value is not None]
    if asked and policy.keeps_all:
        raise InvalidRequestError(
            f"{asked[0]} was given, but policy {policy.name!r} keeps everything; drop it or ask for one of "
            f"{', '.join(repr(name) for name, each in POLICIES.items() if not each.keeps_all)}"
        )
    read_knobs(policy, knobs)
    if asked and (others := [*asked[1:], *(name for name in knobs if name in counting_knobs(policy))]):
        raise InvalidRequestError(
            f"{asked[0]} was given beside {', '.join(others)}; give one of them alone"
        )
    if policy is auto.POLICY:
        _validate_auto(compression, shared)
    if tokens is not None and not _are_counts(tokens):
        raise InvalidRequestError(
            f"tokens is {tokens!r}; it must be a whole number from 1 on, or a list of such"
        )
    if budget is not None and not shared:
        raise InvalidRequestError(
            f"layer_budget is {budget!r}, but there is no kv_keep; give what layers are to share"
        )
    if budget is not None and prunes(compression):
        raise InvalidRequestError(
            f"layer_budget is {budget!r}, but prefill 'prune' has a shape of its own; give tokens for each "
            "layer, or ask for prefill 'evict'"
        )
    if budget is not None and not _is_budget(budget):
        raise InvalidRequestError(
            f"layer_budget is {budget!r}; it must be {' or '.join(map(repr, BUDGETS))}, or a list of "
            "weights from 1e-6 to 1e6, one for each layer"
        )
    floor = dict(compression.parameters).get(FLOOR, 0.0)
    if isinstance(floor, bool) or not (isinstance(floor, int | float) and 0 <= floor <= 1):
        raise InvalidRequestError(f"span_floor is {floor!r}; it must be a number in [0, 1]")
    if floor and policy.choose is ends:
        raise InvalidRequestError(
            f"span_floor is {floor}, but policy {policy.name!r} looks at nothing by which it could choose; "
            "leave it out, or ask for a policy that scores, as 'defensive' does"
        )
    if knobs.get("heads") == "each" and prunes(compression):
        raise InvalidRequestError(
            "heads is 'each', which prefill 'prune' cannot have, as a hidden state serves all heads; ask "
            "for prefill 'evict'"
        )
    if policy.prefills and compression.prefill not in ("", *policy.prefills):
        known = " or ".join(map(repr, policy.prefills))
        raise InvalidRequestError(f"prefill is {compression.prefill!r}; it must be {known}")
    recall = compression.recall
    if recall not in get_args(Recall):
        raise InvalidRequestError(f"recall is {recall!r}; it must be one of {', '.join(get_args(Recall))}")
    if recall in ("step", "exact") and prunes(compression):
        raise InvalidRequestError(
            f"recall {recall!r} needs all KV, which prefill 'prune' never computes; ask for prefill 'evict'"
        )
    if recall == "step" and kv_keep is not None and kv_keep <= LEAST_INDEXED:
        raise InvalidRequestError(
            f"kv_keep is {kv_keep}; with recall 'step', whose index takes part of it, it must be above "
            f"{LEAST_INDEXED}"
        )


def _validate_auto(compression: Compression, shared: bool) -> None:
    """Of what is valid for others, refuses what leaves ``auto`` no choice, or no share to choose by."""
    if compression.parameters:
        name, value = next(iter(dict(compression.parameters).items()))
        raise InvalidRequestError(
            f"{name} is {value!r}, but policy 'auto' chooses that itself; drop it, or name a policy"
        )
    if not shared:
        raise InvalidRequestError(
            "policy 'auto' was given neither kv_bytes_keep nor kv_keep; give the share of bytes, or of "
            "tokens, at which it is to choose"
        )
    if compression.prefill not in ("", *auto.PREFILLS):
        raise InvalidRequestError(
            f"prefill is {compression.prefill!r}; it must be {' or '.join(map(repr, auto.PREFILLS))}"
        )


def _are_counts(tokens: Parameter) -> bool:
    counts = tokens if isinstance(tokens, tuple) else (tokens,)
    return bool(counts) and all(
        isinstance(count, int | float) and count is not True and count >= 1 and float(count).is_integer()
        for count in counts
    )


def _is_budget(budget: Parameter) -> bool:
    if isinstance(budget, str):
        return budget in BUDGETS
    return (
        isinstance(budget, tuple)
        and bool(budget)
        and all(
            isinstance(weight, int | float) and weight is not True and 1e-6 <= weight <= 1e6
            for weight in budget
        )
    )
