"""StreamingLLM (arXiv 2309.17453): the first few tokens and a window of the latest.

Keys keep the rotation of their original positions; the paper's re-rotation inside the cache is left out,
so output may differ from its code beyond the model's context length.
"""

from dataclasses import dataclass

from workers.budget.plan import GenerationPlan, KeepPlan
from workers.policies.policy import Policy, Target, knob

CHUNK = 16


@dataclass(frozen=True)
class StreamingKnobs:
    """Tokens that stay."""

    sinks: int = knob(4, "[0, ...)", "first tokens")
    window: int = knob(1020, "[1, ...)", "latest tokens")


def plan_streaming(target: Target, knobs: StreamingKnobs) -> KeepPlan:
    """The counts for one prompt; ``kv_keep`` sets sinks and window together to that fraction."""
    return first_and_latest(target, knobs.sinks, knobs.window)


def first_and_latest(target: Target, sinks: int, window: int) -> KeepPlan:
    """So many first tokens stay, and so many latest; or the fraction ``kv_keep`` of both together."""
    capacity, prompt_tokens, layers = sinks + window, target.prompt_tokens, target.layers
    bound_by = ""
    if target.kv_keep is not None:
        wanted = round(target.kv_keep * prompt_tokens)
        capacity = max(wanted, sinks + 1)
        bound_by = "sinks" if min(capacity, prompt_tokens) > wanted else ""
    kept = min(capacity, prompt_tokens)
    of_prompt = min(sinks, kept - 1)
    return KeepPlan(
        prompt_tokens=prompt_tokens,
        kept=(kept,) * layers,
        recent=kept - of_prompt,
        sinks=of_prompt,
        generation=GenerationPlan(
            chunk=CHUNK,
            window=capacity - kept,
            # Where the prompt is shorter than the sinks, the first generated tokens are sinks too.
            start=(sinks,) * layers,
            keeps=(0,) * layers,
        ),
        bound_by=bound_by,
    )


POLICY = Policy(
    "streaming",
    "1",
    "the first tokens and the latest (StreamingLLM, arXiv 2309.17453)",
    StreamingKnobs,
    plan_streaming,
)
