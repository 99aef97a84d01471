"""``auto``: what was measured best of a model where so much stays. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from pyramidserve.types import Compression
from workers.policies.budget import Trial
from workers.policies.policy import Policy, Target

# What `pyramidserve calibrate` measures: few, of different kinds. Other knobs are their authors'.
CANDIDATES = (
    Compression("defensive", "evict"),
    Compression("pyramid", "evict"),
    Compression("snapkv"),
    Compression("expected_attention", parameters={"layer_budget": "calibrated"}),
    Compression("kvzap", parameters={"window_size": 200}),
    Compression("defensive", "prune"),
)
# Of models of which nothing was measured.
UNMEASURED = Compression("defensive", "evict")
PREFILLS = ("evict", "prune")


@dataclass(frozen=True)
class AutoKnobs:
    """There are none."""


def choose_policy(trials: Sequence[Trial], kv_keep: float, prefill: str) -> Compression:
    """Policy, prefill and knobs with the best score at the measured share that is nearest to ``kv_keep``.

    Nearest is what it is the fewest times more or less than. What prunes is for those who ask for it: its
    KV cannot come back in every way. Without trials it is UNMEASURED, in the ``prefill`` asked for.
    """
    prunes = prefill == "prune"
    known = [each for each in trials if (each.prefill == "prune") == prunes]
    if not known:
        return replace(UNMEASURED, prefill=prefill or UNMEASURED.prefill)
    share = min((each.kept for each in known), key=lambda kept: abs(math.log(kept / kv_keep)))
    best = max((each for each in known if each.kept == share), key=lambda each: each.score)
    return Compression(best.policy, best.prefill, parameters=best.parameters)


def _unsettled(target: Target, knobs: AutoKnobs) -> NoReturn:
    raise AssertionError("'auto' is settled before anything is planned")


POLICY = Policy("auto", "1", "what was measured best of the model", AutoKnobs, _unsettled)
