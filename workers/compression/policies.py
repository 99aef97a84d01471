"""The policies by the names that requests use: one file each, behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.compression.full import plan_full, validate_full
from workers.compression.plan import KeepPlan
from workers.compression.pyramid import plan_pyramid, validate_pyramid
from workers.compression.streaming import plan_streaming, validate_streaming


@dataclass(frozen=True)
class Policy:
    """A compression policy: ``plan`` counts what stays, ``validate`` refuses wrong knobs."""

    plan: Callable[[Compression, int, int], KeepPlan]
    validate: Callable[[Compression], None]


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


@lru_cache(maxsize=4096)
def plan(compression: Compression, prompt_tokens: int, layers: int) -> KeepPlan:
    """What a valid ``compression`` keeps of a prompt of ``prompt_tokens`` >= 1, per layer."""
    return POLICIES[compression.policy].plan(compression, prompt_tokens, layers)


def policy_name(compression: Compression) -> str:
    """The policy and, where there is a choice, its prefill mode, as in ``pyramid/prune``."""
    if compression.policy == "pyramid":
        return f"pyramid/{compression.prefill}"
    return compression.policy
