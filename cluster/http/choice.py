"""What has come of one choice of a request, and what is said of several together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyramidserve.tools import ToolCallPart
from pyramidserve.types import Compression, FinishReason, Receipt, TokenLogprob, Tokens
from workers.policies.registry import plan

# An output id, and how likely it was.
Told = tuple[int, TokenLogprob]
FINISHED = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass
class Choice:
    """What has come of one choice, of the ``prompt``-th prompt, whose last ``given`` ids are its output."""

    index: int
    prompt: int
    given: int = 0
    prompt_tokens: int = 0
    parts: list[str] = field(default_factory=list)
    output_tokens: int = 0
    session_id: str = ""
    compression: Compression = field(default_factory=Compression)
    told: list[Told] = field(default_factory=list)
    calls: list[ToolCallPart] = field(default_factory=list)
    receipt: Receipt | None = None

    def begin(self, prompt_tokens: int) -> None:
        """Takes the beginning in; what is given belongs to the prompt."""
        self.prompt_tokens, self.output_tokens = prompt_tokens + self.given, -self.given

    def take(self, tokens: Tokens) -> None:
        """Takes output in."""
        self.output_tokens += len(tokens.token_ids)
        self.parts.append(tokens.text)
        self.told += zip(tokens.token_ids, tokens.logprobs, strict=False)
        self.calls += tokens.tool_calls

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def ended(self) -> Receipt:
        """How it ended, which it has."""
        assert self.receipt is not None
        return self.receipt


def finish(choice: Choice) -> dict[str, Any]:
    """Why it ended, as a choice says it."""
    receipt = choice.ended
    reason = FINISHED[receipt.finish_reason]
    return {
        "finish_reason": "tool_calls" if choice.calls and reason == "stop" else reason,
        "stop_reason": receipt.stop_string or None,
    }


def kv_tokens(choice: Choice, layers: int) -> dict[str, Any]:
    """How many tokens a choice has so far, and how many of them each layer has on the device, as planned.

    The last one is never fed. A turn that goes on with the KV of the one before may hold less.
    """
    prompt, fed = choice.prompt_tokens - choice.given, choice.output_tokens + choice.given - 1
    keep = plan(choice.compression, prompt, layers)
    return {"all": prompt + fed, "device": [keep.tokens(layer, fed) for layer in range(layers)]}


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens so far: of each prompt once, and of all choices' outputs."""
    prompts = {choice.prompt: choice.prompt_tokens for choice in choices}
    read, written = sum(prompts.values()), sum(choice.output_tokens for choice in choices)
    cached = sum(each.receipt.reused_tokens for each in choices if each.receipt)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def told(choices: Sequence[Choice]) -> dict[str, Any]:
    """The receipt, or those of all choices, and of which sessions they were turns."""
    plain = [_plain(each) for each in choices]
    return plain[0] if len(plain) == 1 else {"receipts": plain}


def _plain(choice: Choice) -> dict[str, Any]:
    receipt = choice.ended
    own = {"finish_reason": receipt.finish_reason.value, "session_id": choice.session_id}
    return dataclasses.asdict(receipt) | own
