"""The policies by the names that requests use: those here, and those of others that are wanted."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression, Parameter, Recall
from workers.budget.kv_format import KV_FORMATS
from workers.budget.kv_share import LEAST_INDEXED, KVShare
from workers.budget.plan import INDEX_SHARE, KeepPlan
from workers.events import tell
from workers.model.config import ModelConfig
from workers.policies import (
    auto,
    defensive,
    expected_attention,
    full,
    h2o,
    keydiff,
    kvzap,
    local,
    pyramid,
    scissorhands,
    snapkv,
    streaming,
    tova,
)
from workers.policies.budget import (
    BUDGETS,
    CALIBRATED,
    MEASURED,
    PYRAMID,
    UNIFORM,
    pyramid_weights,
    read_calibration,
)
from workers.policies.gates import Gates, read_gates
from workers.policies.observed import Observed, ends
from workers.policies.policy import Policy, Target, counting_knobs, read_knobs

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

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
# What was measured of models, by their fingerprints.
CALIBRATIONS = {each.model: each for each in map(read_calibration, sorted(MEASURED.glob("*.json")))}
GATES = {each.model: each for each in map(read_gates, sorted(MEASURED.glob("*.safetensors")))}


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


def use_budgets(file: str) -> None:
    """Takes in what ``pyramidserve calibrate`` has written; "": nothing. Raises ConfigurationError."""
    if file:
        calibration = read_calibration(Path(file))
        CALIBRATIONS[calibration.model] = calibration


def use_gates(file: str) -> None:
    """As ``use_budgets``, of the gates that it has trained."""
    if file:
        gates = read_gates(Path(file))
        GATES[gates.model] = gates


def gates_of(model: str) -> Gates | None:
    """The gates that were trained of a ``model``, a fingerprint."""
    return GATES.get(model)


def settled(compression: Compression, model: ModelConfig, kv_dtype: str, prompt_tokens: int) -> Compression:
    """What a valid ``compression`` comes to for a prompt of ``prompt_tokens`` >= 1 of a ``model``.

    A share of bytes becomes one of tokens by ``kv_dtype``, of KV_FORMATS, or ``full`` where all stay;
    ``auto`` becomes what was measured best; and there are weights where its budget is the one that was
    measured. All of it goes with the request, so that router and shards plan the same. Raises
    InvalidRequestError where the policy chooses by gates and the model has none.
    """
    compression = _chosen(_in_tokens(compression, model, kv_dtype, prompt_tokens), model)
    if POLICIES[compression.policy].gated and model.fingerprint not in GATES:
        raise InvalidRequestError(
            f"policy {compression.policy!r} needs gates, and none were trained of models with "
            f"{model.fingerprint}: run `pyramidserve calibrate DIR --gates FILE` and name the file as "
            "gates of the deployment, or ask for another policy, such as 'expected_attention'"
        )
    asked, kv_keep = dict(compression.parameters), compression.kv_keep
    usual = CALIBRATED if POLICIES[compression.policy].calibrates else UNIFORM
    calibration = CALIBRATIONS.get(model.fingerprint) if asked.get(BUDGET, usual) == CALIBRATED else None
    if calibration is None or kv_keep is None or prunes(compression):
        return compression
    return replace(compression, parameters={**asked, BUDGET: calibration.at(kv_keep)})


def _in_tokens(
    compression: Compression, model: ModelConfig, kv_dtype: str, prompt_tokens: int
) -> Compression:
    """With the ``kv_keep`` that its share of bytes comes to, if it says one; ``full`` where all stay."""
    share, kv_keep = compression.kv_bytes_keep, compression.kv_keep
    if share is None or kv_keep is not None or keeps_all(compression):
        return compression
    shares = KVShare.of(KV_FORMATS[kv_dtype], model.head_size)
    kv_keep = shares.kv_keep(share, prompt_tokens, recall(compression) == "step")
    if kv_keep == 1:
        return Compression(recall=compression.recall, kv_bytes_keep=share)
    return replace(compression, kv_keep=kv_keep)


def _chosen(compression: Compression, model: ModelConfig) -> Compression:
    """What ``auto`` stands for; another policy as it is."""
    kv_keep = compression.kv_keep
    if compression.policy != auto.POLICY.name or kv_keep is None:
        return compression
    if kv_keep == 1:
        return Compression(recall=compression.recall)
    calibration = CALIBRATIONS.get(model.fingerprint)
    trials = [each for each in calibration.trials if _there(each.policy, model)] if calibration else []
    if not trials:
        _tell_unmeasured(model.fingerprint)
    chosen = suited(auto.choose_policy(trials, kv_keep, compression.prefill), model)
    return replace(compression, policy=chosen.policy, prefill=chosen.prefill, parameters=chosen.parameters)


def _there(policy: str, model: ModelConfig) -> bool:
    return policy in POLICIES and (model.fingerprint in GATES or not POLICIES[policy].gated)


def candidates(model: ModelConfig) -> list[Compression]:
    """What is tried of a ``model``, for ``auto`` to choose among: those that it can have."""
    return [suited(each, model) for each in auto.CANDIDATES if _there(each.policy, model)]


def suited(compression: Compression, model: ModelConfig) -> Compression:
    """With one choice for all heads where the model has windows, which cannot have one for each."""
    policy = POLICIES[compression.policy]
    each = any(knob.name == "heads" and knob.default == "each" for knob in fields(policy.knobs))
    if not (each and any(model.windows)) or prunes(compression):
        return compression
    return replace(compression, parameters={**dict(compression.parameters), "heads": "all"})


@lru_cache(maxsize=64)
def _tell_unmeasured(model: str) -> None:
    """Once of each ``model``."""
    tell(logger, logging.INFO, "policies_not_measured", model=model, auto=policy_name(auto.UNMEASURED))


def alike(one: Compression, other: Compression) -> bool:
    """Whether both ask for the same, to however many tokens their shares of bytes come."""
    return one == other or (one.kv_bytes_keep is not None and _asked(one) == _asked(other))


def _asked(compression: Compression) -> Compression:
    parameters = dict(compression.parameters)
    parameters.pop(BUDGET, None)  # its weights are those of the share of tokens
    return replace(compression, kv_keep=None, parameters=parameters)


def versions(others: Sequence[str] = (), model: str = "") -> dict[str, str]:
    """Of each policy of this folder and those ``others`` that are enabled, by name.

    Where the gates of a ``model``, a fingerprint, are known, their digest is part of it.
    """
    policies = [*BUILT_IN, *(POLICIES[name] for name in others)]
    known = f" with gates {GATES[model].digest}" if model in GATES else ""
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


def validate(compression: Compression) -> None:
    """Raises InvalidRequestError, naming the value and the way out."""
    policy = POLICIES.get(compression.policy)
    if policy is None:
        raise InvalidRequestError(f"unknown policy {compression.policy!r}; known are {', '.join(POLICIES)}")
    shares = {"kv_keep": compression.kv_keep, "kv_bytes_keep": compression.kv_bytes_keep}
    for name, value in shares.items():
        if value is not None and not 0 < value <= 1:
            raise InvalidRequestError(f"{name} is {value}; it must be in (0, 1]")
    knobs, tokens, budget = _parameters(compression)
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
    knobs, tokens, budget = _parameters(compression)
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
    policy, (knobs, *_) = POLICIES[compression.policy], _parameters(compression)
    read = read_knobs(policy, knobs)
    return lambda observed, tokens, keep: policy.choose(observed, tokens, keep, read)


def span_floor(compression: Compression) -> float:
    """The share of instructions of which a valid ``compression`` keeps the best at least."""
    floor = dict(compression.parameters).get(FLOOR, 0.0)
    assert isinstance(floor, int | float)
    return float(floor)


def says_how_much(compression: Compression) -> bool:
    """Whether it says itself how much stays, with a fraction, counts or knobs."""
    knobs, tokens, _ = _parameters(compression)
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


def _parameters(
    compression: Compression,
) -> tuple[dict[str, Parameter], Parameter | None, Parameter | None]:
    """The policy's knobs that are given, the counts, and the budget."""
    knobs = dict(compression.parameters)
    knobs.pop(FLOOR, None)  # counts do not depend on it
    return knobs, knobs.pop(TOKENS, None), knobs.pop(BUDGET, None)


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
