"""StreamingLLM (arXiv 2309.17453): the first few tokens and a window of the latest.

Keys keep the rotation of their original positions; the paper's re-rotation inside the cache is left out,
so output may differ from its code beyond the model's context length.
"""

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, StreamingParameters
from workers.budget.plan import GenerationPlan, KeepPlan

CHUNK = 16


def plan_streaming(compression: Compression, prompt_tokens: int, layers: int) -> KeepPlan:
    """The counts for one prompt; ``kv_keep`` sets sinks and window together to that fraction."""
    parameters = compression.streaming or StreamingParameters()
    capacity = parameters.sinks + parameters.window
    bound_by = ""
    if compression.kv_keep is not None:
        wanted = round(compression.kv_keep * prompt_tokens)
        capacity = max(wanted, parameters.sinks + 1)
        bound_by = "sinks" if min(capacity, prompt_tokens) > wanted else ""
    kept = min(capacity, prompt_tokens)
    sinks = min(parameters.sinks, kept - 1)
    return KeepPlan(
        prompt_tokens=prompt_tokens,
        kept=(kept,) * layers,
        recent=kept - sinks,
        sinks=sinks,
        generation=GenerationPlan(
            chunk=CHUNK,
            window=capacity - kept,
            # Where the prompt is shorter than the sinks, the first generated tokens are sinks too.
            start=(parameters.sinks,) * layers,
            keeps=(0,) * layers,
        ),
        bound_by=bound_by,
    )


def validate_streaming(compression: Compression) -> None:
    """Raises InvalidRequestError, naming the knob and its range."""
    parameters = compression.streaming
    if parameters is None:
        return
    if parameters.sinks < 0:
        raise InvalidRequestError(f"sinks is {parameters.sinks}; it must be 0 or more")
    if parameters.window < 1:
        raise InvalidRequestError(f"window is {parameters.window}; it must be 1 or more")
