"""The policies by the names that requests use: one file each, behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast, get_args

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Recall
from workers.budget.plan import INDEX_SHARE, KeepPlan
from workers.policies.full import plan_full, validate_full
from workers.policies.pyramid import plan_pyramid, validate_pyramid
from workers.policies.streaming import plan_streaming, validate_streaming


@dataclass(frozen=True)
class Policy:
    """A compression policy: ``plan`` counts what stays, ``validate`` refuses wrong knobs."""

    plan: Callable[[Compression, int, int], KeepPlan]
    validate: Callable[[Compression], None]


# Tokens that "exact" generates ahead of their verification, at most: fewer than are compressed at once.
DRAFTS = 8

POLICIES = {
    "full": Policy(plan_full, validate_full),
    "streaming": Policy(plan_streaming, validate_streaming),
    "pyramid": Policy(plan_pyramid, validate_pyramid),
}


def validate(compression: Compression) -> None:
    """Raises InvalidRequestError, naming the value and the way out."""
    policy = POLICIES.get(compression.policy)
    if policy is None:
        raise InvalidRequestError(f"unknown policy {compression.policy!r}; known are {', '.join(POLICIES)}")
    kv_keep = compression.kv_keep
    if kv_keep is not None and not 0 < kv_keep <= 1:
        raise InvalidRequestError(f"kv_keep is {kv_keep}; it must be in (0, 1]")
    for name, knobs in (("pyramid", compression.pyramid), ("streaming", compression.streaming)):
        if knobs is None:
            continue
        if compression.policy != name:
            raise InvalidRequestError(
                f"{name} parameters were given with policy {compression.policy!r}; "
                f"drop them or ask for policy {name!r}"
            )
        if kv_keep is not None:
            raise InvalidRequestError(
                f"kv_keep {kv_keep} was given beside {name} parameters; give one of the two"
            )
    policy.validate(compression)
    recall = compression.recall
    if recall not in get_args(Recall):
        raise InvalidRequestError(f"recall is {recall!r}; it must be one of {', '.join(get_args(Recall))}")
    if recall in ("step", "exact") and prunes(compression):
        raise InvalidRequestError(
            f"recall {recall!r} needs all KV, which prefill 'prune' never computes; ask for prefill 'evict'"
        )
    if recall == "step" and kv_keep is not None and kv_keep <= 2 * INDEX_SHARE:
        raise InvalidRequestError(
            f"kv_keep is {kv_keep}; with recall 'step', whose index takes part of it, it must be above "
            f"{2 * INDEX_SHARE}"
        )


@lru_cache(maxsize=4096)
def plan(compression: Compression, prompt_tokens: int, layers: int) -> KeepPlan:
    """What a valid ``compression`` keeps of a prompt of ``prompt_tokens`` >= 1, per layer."""
    wanted, indexes = compression, recall(compression) == "step"
    if indexes and compression.kv_keep is not None:
        # The index is part of what stays on the device.
        wanted = replace(compression, kv_keep=(compression.kv_keep - INDEX_SHARE) / (1 - INDEX_SHARE))
    keep = POLICIES[compression.policy].plan(wanted, prompt_tokens, layers)
    drafts = DRAFTS if recall(compression) == "exact" else 0
    return replace(
        keep,
        drafts=drafts,
        spills_all=drafts > 0 or indexes,
        spills_hidden=keep.drops_hidden_states and recall(compression) == "turn",
        indexes=indexes,
    )


def recall(compression: Compression) -> Recall:
    """When evicted KV comes back; never where all stays."""
    return "off" if compression.policy == "full" else cast(Recall, compression.recall)


def prunes(compression: Compression) -> bool:
    """Whether tokens that are not chosen go no deeper, so that a choice holds for its prompt alone."""
    return compression.policy == "pyramid" and compression.prefill == "prune"


def policy_name(compression: Compression) -> str:
    """The policy and, where there is a choice, its prefill mode, as in ``pyramid/prune``."""
    if compression.policy == "pyramid":
        return f"pyramid/{compression.prefill}"
    return compression.policy
