"""The policies by the names that requests use: those here, and those of others that are wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import entry_points
from typing import cast, get_args

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression, Recall
from workers.budget.plan import INDEX_SHARE, KeepPlan
from workers.policies import full, local, pyramid, streaming
from workers.policies.policy import Policy, Target, read_knobs

# Where packages of others name their policies.
ENTRY_POINTS = "pyramidserve.policies"
# Tokens that "exact" generates ahead of their verification, at most: fewer than are compressed at once.
DRAFTS = 8

BUILT_IN = (full.POLICY, local.POLICY, streaming.POLICY, pyramid.POLICY)
POLICIES = {policy.name: policy for policy in BUILT_IN}


def enable(names: Sequence[str], asked: str = "policies names") -> None:
    """Loads the policies of others that are named; ``asked`` says where, as in "policies names".

    Raises ConfigurationError where there is none of that name, or it is not what it should be.
    """
    for name in names:
        if name in POLICIES:
            continue
        installed = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
        if name not in installed:
            raise ConfigurationError(
                f"{asked} {name!r}, which is not installed; known are {', '.join(POLICIES)}, and as "
                f"entry points {ENTRY_POINTS!r} of packages: {', '.join(sorted(installed)) or 'none'}"
            )
        try:
            policy = installed[name].load()
        except Exception as error:
            raise ConfigurationError(
                f"policy {name!r} of {installed[name].value!r} cannot be loaded: {error!r}"
            ) from error
        if not isinstance(policy, Policy) or policy.name != name:
            raise ConfigurationError(
                f"{installed[name].value!r} is {policy!r}; it must be a Policy whose name is {name!r}"
            )
        POLICIES[name] = policy


def versions(others: Sequence[str] = ()) -> dict[str, str]:
    """Of each policy of this folder and those ``others`` that are enabled, by name."""
    names = (*(policy.name for policy in BUILT_IN), *others)
    return {name: POLICIES[name].version for name in names}


def skew(own: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Which policies two processes have in other versions, in words; "" where none are."""
    return "; ".join(
        f"policy {name!r} in version {own.get(name, 'none')} here and {other.get(name, 'none')} there"
        for name in sorted(own.keys() | other.keys())
        if own.get(name) != other.get(name)
    )


def validate(compression: Compression) -> None:
    """Raises InvalidRequestError, naming the value and the way out."""
    policy = POLICIES.get(compression.policy)
    if policy is None:
        raise InvalidRequestError(f"unknown policy {compression.policy!r}; known are {', '.join(POLICIES)}")
    kv_keep = compression.kv_keep
    if kv_keep is not None and not 0 < kv_keep <= 1:
        raise InvalidRequestError(f"kv_keep is {kv_keep}; it must be in (0, 1]")
    if kv_keep is not None and policy.keeps_all:
        raise InvalidRequestError(
            f"kv_keep is {kv_keep}, but policy {policy.name!r} keeps everything; drop it or ask for one of "
            f"{', '.join(repr(name) for name, each in POLICIES.items() if not each.keeps_all)}"
        )
    if kv_keep is not None and compression.parameters:
        raise InvalidRequestError(
            f"kv_keep {kv_keep} was given beside {', '.join(dict(compression.parameters))}; give the "
            "fraction or the knobs"
        )
    read_knobs(policy, dict(compression.parameters))
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
    if recall == "step" and kv_keep is not None and kv_keep <= 2 * INDEX_SHARE:
        raise InvalidRequestError(
            f"kv_keep is {kv_keep}; with recall 'step', whose index takes part of it, it must be above "
            f"{2 * INDEX_SHARE}"
        )


@lru_cache(maxsize=4096)
def plan(compression: Compression, prompt_tokens: int, layers: int) -> KeepPlan:
    """What a valid ``compression`` keeps of a prompt of ``prompt_tokens`` >= 1, per layer."""
    policy, kv_keep, indexes = (
        POLICIES[compression.policy],
        compression.kv_keep,
        recall(compression) == "step",
    )
    if indexes and kv_keep is not None:
        # The index is part of what stays on the device.
        kv_keep = (kv_keep - INDEX_SHARE) / (1 - INDEX_SHARE)
    target = Target(prompt_tokens, layers, kv_keep, prunes(compression))
    keep = policy.plan(target, read_knobs(policy, dict(compression.parameters)))
    drafts = DRAFTS if recall(compression) == "exact" else 0
    return replace(
        keep,
        drafts=drafts,
        spills_all=drafts > 0 or indexes,
        spills_hidden=keep.drops_hidden_states and recall(compression) == "turn",
        indexes=indexes,
    )


def keeps_all(compression: Compression) -> bool:
    """Whether nothing is evicted."""
    return POLICIES[compression.policy].keeps_all


def recall(compression: Compression) -> Recall:
    """When evicted KV comes back; never where all stays."""
    return "off" if keeps_all(compression) else cast(Recall, compression.recall)


def prunes(compression: Compression) -> bool:
    """Whether tokens that are not chosen go no deeper, so that a choice holds for its prompt alone."""
    return _prefill(compression) == "prune"


def policy_name(compression: Compression) -> str:
    """The policy and, where there is a choice, its prefill mode, as in ``pyramid/prune``."""
    prefill = _prefill(compression)
    return f"{compression.policy}/{prefill}" if prefill else compression.policy


def _prefill(compression: Compression) -> str:
    """How it prefills; "" where there is no choice."""
    prefills = POLICIES[compression.policy].prefills
    return (compression.prefill or prefills[0]) if prefills else ""
