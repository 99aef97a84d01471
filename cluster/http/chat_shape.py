"""The choices of /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from cluster.http.choice import Choice, Told, finish
from cluster.http.pieces import Piece, likely
from pyramidserve.tools import ToolCall, ToolCallPart, whole_calls
from pyramidserve.types import Tokens


class ChatShape:
    """Of /v1/chat/completions."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def begin(self, choice: Choice) -> dict[str, Any]:
        """The choice of a first chunk."""
        return self.delta(choice, {"role": "assistant", "content": ""})

    def more(self, choice: Choice, tokens: Tokens, told: Sequence[Told]) -> dict[str, Any]:
        """The choice of a chunk that brings ``tokens``."""
        delta: dict[str, Any] = {"content": tokens.text} if tokens.text or not tokens.tool_calls else {}
        if tokens.tool_calls:
            delta["tool_calls"] = [_part(each) for each in tokens.tool_calls]
        return self.delta(choice, delta) | {"logprobs": self._logprobs(told)}

    def end(self, choice: Choice) -> dict[str, Any]:
        """The choice of its last chunk."""
        return self.delta(choice, {}) | finish(choice)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        calls = [_call(each) for each in whole_calls(choice.calls)] or None
        content = choice.text if choice.text or not calls else None
        message = {"role": "assistant", "content": content, "refusal": None, "tool_calls": calls}
        told = self._logprobs(choice.told)
        return {"index": choice.index, "message": message, "logprobs": told} | finish(choice)

    def delta(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        """The choice of a chunk."""
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        return {"content": likely(self._piece, told), "refusal": None} if told else None


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _part(part: ToolCallPart) -> dict[str, Any]:
    """What is new of a call; what names it is in the first part alone."""
    if not part.name:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index} | _call(ToolCall(part.id, part.name, part.arguments))
