"""What the output of /v1/responses consists of: a message, and calls of tools."""

from collections.abc import Sequence
from typing import Any, Protocol

from cluster.http.choice import Told
from cluster.http.pieces import Piece, likely
from pyramidserve.tools import ToolCallPart

# Names of events, without what all begin with, and their facts.
Events = list[tuple[str, dict[str, Any]]]


class OutputItem(Protocol):
    """One item; its events but the first and the last, which all have in common."""

    def shape(self, status: str) -> dict[str, Any]:
        """It as a whole, so far."""
        ...

    def ended(self) -> Events:
        """What is said of its parts at its end."""
        ...


class MessageItem:
    """What is said; ``number``: its place in the output."""

    def __init__(self, name: str, number: int, piece: Piece) -> None:
        self._name, self._piece = name, piece
        self._place = {"item_id": name, "output_index": number, "content_index": 0}
        self._texts: list[str] = []
        self._told: list[dict[str, Any]] = []

    def began(self) -> Events:
        """What is said before its text."""
        return [("content_part.added", {"part": self._part()} | self._place)]

    def add(self, text: str, told: Sequence[Told]) -> Events:
        """Takes text in, and how likely it was."""
        likelihoods = likely(self._piece, told)
        self._texts.append(text)
        self._told += likelihoods
        return [("output_text.delta", {"delta": text, "logprobs": likelihoods} | self._place)]

    def ended(self) -> Events:
        part = self._part()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            ("output_text.done", done | self._place),
            ("content_part.done", {"part": part} | self._place),
        ]

    def shape(self, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._name,
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._told)}


class CallItem:
    """A call; ``number``: its place in the output."""

    def __init__(self, name: str, number: int, first: ToolCallPart) -> None:
        self._name, self._call = name, first
        self._place = {"item_id": name, "output_index": number}
        self._arguments = ""

    def add(self, arguments: str) -> Events:
        """Takes more of its arguments in."""
        self._arguments += arguments
        delta = {"delta": arguments} | self._place
        return [("function_call_arguments.delta", delta)] if arguments else []

    def ended(self) -> Events:
        done = {"name": self._call.name, "arguments": self._arguments} | self._place
        return [("function_call_arguments.done", done)]

    def shape(self, status: str) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": self._name,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": self._arguments,
            "status": status,
        }
