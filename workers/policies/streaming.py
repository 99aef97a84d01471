"""StreamingLLM (arXiv 2309.17453): the first few tokens and a window of the latest.

Keys keep the rotation of their original positions; the paper's re-rotation inside the cache is left out,
so output may differ from its code beyond the model's context length.
"""

from dataclasses import dataclass

from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, hold
from workers.policies.policy import Policy, Target, knob

CHUNK = 16


@dataclass(frozen=True)
class StreamingKnobs:
    """Tokens that stay."""

    sinks: int = knob(4, "[0, ...)", "first tokens", counts=True)
    window: int = knob(1020, "[1, ...)", "latest tokens", counts=True)


def plan_streaming(target: Target, knobs: StreamingKnobs) -> KeepPlan:
    """The counts for one prompt; ``kv_keep`` sets sinks and window together to that fraction."""
    sinks = knobs.sinks
    counts = capacities(target, sinks + knobs.window, least=sinks + 1)
    return hold(target, counts, min(counts) - sinks, CHUNK, sinks)


POLICY = Policy(
    "streaming",
    "2",
    "the first tokens and the latest (StreamingLLM, arXiv 2309.17453)",
    StreamingKnobs,
    plan_streaming,
)
