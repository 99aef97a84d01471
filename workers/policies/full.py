"""The whole cache, nothing evicted: what the other policies are measured against."""

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.budget.plan import KeepPlan


def plan_full(compression: Compression, prompt_tokens: int, layers: int) -> KeepPlan:
    """Keeps every token in every layer."""
    return KeepPlan(prompt_tokens=prompt_tokens, kept=(prompt_tokens,) * layers, recent=prompt_tokens)


def validate_full(compression: Compression) -> None:
    """A full cache has no knobs. Raises InvalidRequestError, naming the value and the way out."""
    if compression.kv_keep is not None:
        raise InvalidRequestError(
            f"kv_keep is {compression.kv_keep}, but policy 'full' keeps everything; "
            "drop it or ask for policy 'pyramid' or 'streaming'"
        )
