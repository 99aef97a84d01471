"""StreamingLLM (arXiv 2309.17453): the first few tokens and a window of the latest.

Positions are those within the cache, as the paper has it (section 3.2), so that a sequence may go on beyond
the model's context: the sinks' keys are rotated anew whenever tokens behind them go. Attention sees
distances alone, and the window's are the same in the cache and in the text, so that nothing else is. With
recall "step" or "exact" tokens attend to the host's, too, which are at their positions in the text: there
the sinks keep theirs, and the context bounds prompt and output together.
"""

from dataclasses import dataclass, replace

from workers.budget.plan import KeepPlan
from workers.policies.capacity import CHUNK, capacities, hold
from workers.policies.policy import Policy, Target, knob


@dataclass(frozen=True)
class StreamingKnobs:
    """Tokens that stay."""

    sinks: int = knob(4, "[0, ...)", "first tokens", counts=True)
    window: int = knob(1020, "[1, ...)", "latest tokens", counts=True)


def plan_streaming(target: Target, knobs: StreamingKnobs) -> KeepPlan:
    """The counts for one prompt; ``kv_keep`` sets sinks and window together to that fraction."""
    sinks = knobs.sinks
    counts = capacities(target, sinks + knobs.window, least=sinks + 1)
    return replace(hold(target, counts, min(counts) - sinks, CHUNK, sinks), within_cache=True)


POLICY = Policy(
    "streaming",
    "3",
    "the first tokens and the latest (StreamingLLM, arXiv 2309.17453)",
    StreamingKnobs,
    plan_streaming,
)
