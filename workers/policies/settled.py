"""What requests come to for a model: bytes tokens, ``auto`` a policy, measured budgets weights. Pure."""

import logging
from dataclasses import fields, replace
from functools import lru_cache

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.budget.kv_format import KV_FORMATS
from workers.budget.kv_share import KVShare
from workers.events import tell
from workers.model.config import ModelConfig
from workers.policies import auto, measured
from workers.policies.budget import CALIBRATED, UNIFORM
from workers.policies.registry import BUDGET, POLICIES, keeps_all, policy_name, prunes, recall

logger = logging.getLogger(__name__)


def settled(compression: Compression, model: ModelConfig, kv_dtype: str, prompt_tokens: int) -> Compression:
    """What a valid ``compression`` comes to for a prompt of ``prompt_tokens`` >= 1 of a ``model``.

    A share of bytes becomes one of tokens by ``kv_dtype``, of KV_FORMATS, or ``full`` where all stay;
    ``auto`` becomes what was measured best; and there are weights where its budget is the one that was
    measured. All of it goes with the request, so that router and shards plan the same. Raises
    InvalidRequestError where the policy chooses by gates and the model has none.
    """
    compression = _chosen(_in_tokens(compression, model, kv_dtype, prompt_tokens), model)
    if POLICIES[compression.policy].gated and model.fingerprint not in measured.GATES:
        raise InvalidRequestError(
            f"policy {compression.policy!r} needs gates, and none were trained of models with "
            f"{model.fingerprint}: run `pyramidserve calibrate DIR --gates FILE` and name the file as "
            "gates of the deployment, or ask for another policy, such as 'expected_attention'"
        )
    asked, kv_keep = dict(compression.parameters), compression.kv_keep
    usual = CALIBRATED if POLICIES[compression.policy].calibrates else UNIFORM
    wanted = asked.get(BUDGET, usual) == CALIBRATED
    calibration = measured.CALIBRATIONS.get(model.fingerprint) if wanted else None
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
    calibration = measured.CALIBRATIONS.get(model.fingerprint)
    trials = [each for each in calibration.trials if _there(each.policy, model)] if calibration else []
    if not trials:
        _tell_unmeasured(model.fingerprint)
    chosen = suited(auto.choose_policy(trials, kv_keep, compression.prefill), model)
    return replace(compression, policy=chosen.policy, prefill=chosen.prefill, parameters=chosen.parameters)


def _there(policy: str, model: ModelConfig) -> bool:
    return policy in POLICIES and (model.fingerprint in measured.GATES or not POLICIES[policy].gated)


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
