"""The policies by the names that requests use: those here, and those of others that are wanted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression, Parameter, Recall
from workers.budget.plan import INDEX_SHARE, KeepPlan
from workers.policies import (
    auto,
    defensive,
    expected_attention,
    full,
    h2o,
    keydiff,
    kvzap,
    local,
    measured,
    pyramid,
    scissorhands,
    snapkv,
    streaming,
    tova,
)
from workers.policies.budget import (
    PYRAMID,
    UNIFORM,
    pyramid_weights,
)
from workers.policies.observed import Observed
from workers.policies.policy import Policy, Target, counting_knobs, read_knobs

if TYPE_CHECKING:
    import torch

Choose = Callable[[Observed, int, int], "torch.Tensor"]

# Where packages of others name their policies.
ENTRY_POINTS = "pyramidserve.policies"
# Tokens that "exact" generates ahead of their verification, at most: fewer than are compressed at once.
DRAFTS = 8

# What any policy takes beside its own knobs: how many tokens each layer is to keep, or how layers share
# what a fraction comes to, as one of BUDGETS or by a weight for each layer.
TOKENS, BUDGET = "tokens", "layer_budget"
# And what any takes that chooses by what it looks at: the share of instructions that stays at least.
FLOOR = "span_floor"

BUILT_IN = (
    full.POLICY,
    local.POLICY,
    streaming.POLICY,
    pyramid.POLICY,
    h2o.POLICY,
    scissorhands.POLICY,
    snapkv.POLICY,
    tova.POLICY,
    keydiff.POLICY,
    expected_attention.POLICY,
    defensive.POLICY,
    kvzap.POLICY,
)
# ``auto`` is none of its own: shards are told what it stands for, and have no version of it.
POLICIES = {policy.name: policy for policy in (*BUILT_IN, auto.POLICY)}


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


def versions(others: Sequence[str] = (), model: str = "") -> dict[str, str]:
    """Of each policy of this folder and those ``others`` that are enabled, by name.

    Where the gates of a ``model``, a fingerprint, are known, their digest is part of it.
    """
    policies = [*BUILT_IN, *(POLICIES[name] for name in others)]
    known = f" with gates {measured.GATES[model].digest}" if model in measured.GATES else ""
    return {each.name: each.version + known * each.gated for each in policies}


def offered() -> list[str]:
    """All that is enabled, each with the ways in which it prefills, as ``policy_name`` says it."""
    return [
        f"{policy.name}/{prefill}" if prefill else policy.name
        for policy in POLICIES.values()
        for prefill in policy.prefills or ("",)
    ]


def skew(own: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Which policies two processes have in other versions, in words; "" where none are."""
    return "; ".join(
        f"policy {name!r} in version {own.get(name, 'none')} here and {other.get(name, 'none')} there"
        for name in sorted(own.keys() | other.keys())
        if own.get(name) != other.get(name)
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
    knobs, tokens, budget = parameters_of(compression)
    counts, weights = _of_layers(tokens, layers), _weights(budget, layers)
    target = Target(prompt_tokens, layers, kv_keep, prunes(compression), counts, weights)
    keep = policy.plan(target, read_knobs(policy, knobs))
    drafts = DRAFTS if recall(compression) == "exact" else 0
    return replace(
        keep,
        drafts=drafts,
        spills_all=drafts > 0 or indexes,
        spills_hidden=keep.drops_hidden_states and recall(compression) == "turn",
        indexes=indexes,
        within_cache=keep.within_cache and not (drafts or indexes),
    )


def chooser(compression: Compression) -> Choose:
    """Chooses as the policy of a valid ``compression`` does: of so many tokens so many."""
    policy, (knobs, *_) = POLICIES[compression.policy], parameters_of(compression)
    read = read_knobs(policy, knobs)
    return lambda observed, tokens, keep: policy.choose(observed, tokens, keep, read)


def span_floor(compression: Compression) -> float:
    """The share of instructions of which a valid ``compression`` keeps the best at least."""
    floor = dict(compression.parameters).get(FLOOR, 0.0)
    assert isinstance(floor, int | float)
    return float(floor)


def says_how_much(compression: Compression) -> bool:
    """Whether it says itself how much stays, with a fraction, counts or knobs."""
    knobs, tokens, _ = parameters_of(compression)
    counting = counting_knobs(POLICIES[compression.policy])
    shares = compression.kv_keep, compression.kv_bytes_keep, tokens
    return any(each is not None for each in shares) or any(name in counting for name in knobs)


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


def parameters_of(
    compression: Compression,
) -> tuple[dict[str, Parameter], Parameter | None, Parameter | None]:
    """The policy's knobs that are given, the counts, and the budget."""
    knobs = dict(compression.parameters)
    knobs.pop(FLOOR, None)  # counts do not depend on it
    return knobs, knobs.pop(TOKENS, None), knobs.pop(BUDGET, None)


def _weights(budget: Parameter | None, layers: int) -> tuple[float, ...] | None:
    """Of each layer; None: as the policy has it. Raises InvalidRequestError where there are not as many."""
    if isinstance(budget, tuple):
        if len(budget) != layers:
            raise InvalidRequestError(
                f"layer_budget has {len(budget)} weights for the {layers} layers of the model; give one "
                "for each"
            )
        return budget
    # Where nothing was measured, "calibrated" is as the policy itself has it.
    return {UNIFORM: (1.0,) * layers, PYRAMID: pyramid_weights(layers)}.get(str(budget))


def _of_layers(tokens: Parameter | None, layers: int) -> tuple[int, ...] | None:
    """Valid counts for each layer. Raises InvalidRequestError where there are not as many."""
    if tokens is None:
        return None
    if not isinstance(tokens, tuple):
        assert isinstance(tokens, int | float)
        return (int(tokens),) * layers
    if len(tokens) != layers:
        raise InvalidRequestError(
            f"tokens has {len(tokens)} counts for the {layers} layers of the model; give one for each, or "
            "a number"
        )
    return tuple(map(int, tokens))


def _prefill(compression: Compression) -> str:
    """How it prefills; "" where there is no choice."""
    if compression.policy == auto.POLICY.name:
        return compression.prefill
    prefills = POLICIES[compression.policy].prefills
    return (compression.prefill or prefills[0]) if prefills else ""
