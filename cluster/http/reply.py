"""A reply as OpenAI's API has it: whole, and in the chunks of a stream."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.http.chat_shape import ChatShape
from cluster.http.choice import Choice, kv_tokens, told, usage
from cluster.http.completion_shape import CompletionShape
from cluster.http.errors import shape_of
from pyramidserve.errors import PyramidServeError
from pyramidserve.types import Receipt, Tokens

Shape = ChatShape | CompletionShape


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
        self,
        names: Names,
        shape: Shape,
        choices: list[Choice],
        with_usage: bool,
        continuously: bool,
        layers: int,
    ) -> None:
        """What it says of each choice is ``shape``'s.

        Args:
            with_usage: at the end of a stream.
            continuously: in every chunk.
            layers: of which chunks say what they have on the device.
        """
        self.choices, self._layers = choices, layers
        self._names, self._shape = names, shape
        self._with_usage, self._continuously = with_usage, continuously
        self._begins = json.dumps(names.of(shape.part))[:-1]

    def begin(self, choice: Choice) -> bytes:
        """The first chunk of a choice."""
        first = self._shape.begin(choice)
        return self._chunk([first]) if first else b""

    def add(self, choice: Choice, tokens: Tokens) -> bytes:
        """Takes output in; its chunk, nothing where its text is still to come."""
        before = len(choice.told)
        choice.take(tokens)
        told = choice.told[before:]
        if not (tokens.text or told or tokens.tool_calls):
            return b""
        held = {"kv_tokens": kv_tokens(choice, self._layers)} if self._layers else {}
        return self._chunk([self._shape.more(choice, tokens, told) | held])

    def end(self, choice: Choice, receipt: Receipt) -> bytes:
        """Takes the end of a choice in; its chunk, and those that end the stream if it was the last."""
        choice.receipt = receipt
        last = all(each.receipt for each in self.choices)
        receipts = {"pyramidserve": told(self.choices)} if last else {}
        own = [self._shape.end(choice)]
        if last and self._with_usage:
            return self._chunk(own) + self._chunk([], {"usage": usage(self.choices)} | receipts)
        return self._chunk(own, receipts)

    def fail(self, error: PyramidServeError) -> bytes:
        """The end of a stream that has begun."""
        return event(json.dumps(shape_of(error))) + self.done

    def whole(self) -> dict[str, Any]:
        """All of it, once every choice has ended."""
        return self._names.of(self._shape.whole) | {
            "choices": [self._shape.choice(choice) for choice in self.choices],
            "usage": usage(self.choices),
            "pyramidserve": told(self.choices),
        }

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        rest: dict[str, Any] = {"choices": choices}
        if self._continuously:
            rest["usage"] = usage(self.choices)
        elif self._with_usage:
            rest["usage"] = None
        return event(self._begins + ", " + json.dumps(rest | (more or {}))[1:])
