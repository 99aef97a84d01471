"""Replies as OpenAI's API has them: whole, and in the chunks of a stream."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.http.errors import shape_of
from pyramidserve.errors import PyramidServeError
from pyramidserve.types import FinishReason, Receipt, Tokens

FINISHED = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass
class Choice:
    """What has come of one choice, of the ``prompt``-th prompt."""

    index: int
    prompt: int
    prompt_tokens: int = 0
    parts: list[str] = field(default_factory=list)
    output_tokens: int = 0
    receipt: Receipt | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def ended(self) -> Receipt:
        """How it ended, which it has."""
        assert self.receipt is not None
        return self.receipt


@dataclass(frozen=True)
class Names:
    """What every part of a reply says of the whole."""

    name: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str) -> dict[str, Any]:
        """The fields with which a part begins."""
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


class ChatShape:
    """Of /v1/chat/completions."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def begin(self, choice: Choice) -> dict[str, Any]:
        """The choice of a first chunk."""
        return self.delta(choice, {"role": "assistant", "content": ""})

    def more(self, choice: Choice, text: str) -> dict[str, Any]:
        """The choice of a chunk that brings ``text``."""
        return self.delta(choice, {"content": text})

    def end(self, choice: Choice) -> dict[str, Any]:
        """The choice of its last chunk."""
        return self.delta(choice, {}) | _finish(choice.ended)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        message = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": None}
        return {"index": choice.index, "message": message, "logprobs": None} | _finish(choice.ended)

    def delta(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        """The choice of a chunk."""
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }


class CompletionShape:
    """Of /v1/completions; ``echoed``: what goes before the text of each prompt."""

    whole = part = "text_completion"

    def __init__(self, echoed: Sequence[str]) -> None:
        self._echoed = echoed

    def begin(self, choice: Choice) -> dict[str, Any] | None:
        """The choice of a first chunk, if there is something to say."""
        return self.more(choice, self._echo(choice)) if self._echo(choice) else None

    def more(self, choice: Choice, text: str) -> dict[str, Any]:
        """The choice of a chunk that brings ``text``."""
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def end(self, choice: Choice) -> dict[str, Any]:
        """The choice of its last chunk."""
        return self.more(choice, "") | _finish(choice.ended)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        return self.more(choice, self._echo(choice) + choice.text) | _finish(choice.ended)

    def _echo(self, choice: Choice) -> str:
        return self._echoed[choice.prompt] if self._echoed else ""


Shape = ChatShape | CompletionShape


def _finish(receipt: Receipt) -> dict[str, Any]:
    return {
        "finish_reason": FINISHED[receipt.finish_reason],
        "stop_reason": receipt.stop_string or None,
    }


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


def told(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """The receipt, or those of all choices."""
    plain = [_plain(each) for each in receipts]
    return plain[0] if len(plain) == 1 else {"receipts": plain}


def _plain(receipt: Receipt) -> dict[str, Any]:
    return dataclasses.asdict(receipt) | {"finish_reason": receipt.finish_reason.value}


def event(data: str, name: str = "") -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {data}\n\n".encode() if name else f"data: {data}\n\n".encode()


class Reply:
    """A whole reply that grows; its chunks are bytes of server-sent events.

    Attributes:
        choices: in the order of their indices.
    """

    done = event("[DONE]")

    def __init__(
        self, names: Names, shape: Shape, choices: list[Choice], with_usage: bool, continuously: bool
    ) -> None:
        """``with_usage``: at the end of a stream; ``continuously``: in every chunk."""
        self.choices = choices
        self._names, self._shape = names, shape
        self._with_usage, self._continuously = with_usage, continuously
        self._begins = json.dumps(names.of(shape.part))[:-1]

    def begin(self, choice: Choice) -> bytes:
        """The first chunk of a choice."""
        first = self._shape.begin(choice)
        return self._chunk([first]) if first else b""

    def add(self, choice: Choice, tokens: Tokens) -> bytes:
        """Takes output in; its chunk, nothing where its text is still to come."""
        choice.output_tokens += len(tokens.token_ids)
        choice.parts.append(tokens.text)
        return self._chunk([self._shape.more(choice, tokens.text)]) if tokens.text else b""

    def end(self, choice: Choice, receipt: Receipt) -> bytes:
        """Takes the end of a choice in; its chunk, and those that end the stream if it was the last."""
        choice.receipt = receipt
        last = all(each.receipt for each in self.choices)
        receipts = told([each.ended for each in self.choices]) if last else None
        if not last or self._with_usage:
            ended = self._chunk([self._shape.end(choice)])
        else:
            ended = self._chunk([self._shape.end(choice)], {"pyramidserve": receipts})
        if last and self._with_usage:
            ended += self._chunk([], {"usage": usage(self.choices), "pyramidserve": receipts})
        return ended

    def fail(self, error: PyramidServeError) -> bytes:
        """The end of a stream that has begun."""
        return event(json.dumps(shape_of(error))) + self.done

    def whole(self) -> dict[str, Any]:
        """All of it, once every choice has ended."""
        return self._names.of(self._shape.whole) | {
            "choices": [self._shape.choice(choice) for choice in self.choices],
            "usage": usage(self.choices),
            "pyramidserve": told([choice.ended for choice in self.choices]),
        }

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        rest: dict[str, Any] = {"choices": choices}
        if self._continuously:
            rest["usage"] = usage(self.choices)
        elif self._with_usage:
            rest["usage"] = None
        return event(self._begins + ", " + json.dumps(rest | (more or {}))[1:])
