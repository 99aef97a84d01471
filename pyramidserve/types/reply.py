"""A whole reply."""

from dataclasses import dataclass

from pyramidserve.tools import ToolCall
from pyramidserve.types.event import TokenLogprob
from pyramidserve.types.receipt import Receipt


@dataclass(frozen=True)
class Reply:
    """A whole reply; ``logprobs`` of each id, where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    receipt: Receipt
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
