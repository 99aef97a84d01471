"""What comes of a request."""

from dataclasses import dataclass

from pyramidserve.tools import ToolCallPart
from pyramidserve.types.receipt import Receipt


@dataclass(frozen=True)
class Started:
    """A request has been accepted: tokens of its prompt, and the seed in force."""

    prompt_tokens: int
    seed: int


@dataclass(frozen=True)
class TokenLogprob:
    """How likely an output token was, as a natural logarithm, and the likeliest ones, best first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """New output: ``token_ids`` from output index ``index`` on.

    ``text`` may lag behind the ids by an unfinished character or a possible stop string. ``logprobs``: one
    for each id, where they were asked for. ``tool_calls``: what is no text, as it calls tools.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallPart, ...] = ()


Event = Started | Tokens | Receipt
