"""The choices of /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from cluster.http.choice import Choice, Told, finish
from cluster.http.pieces import Piece, shown


class ChatShape:
    """Of /v1/chat/completions."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def begin(self, choice: Choice) -> dict[str, Any]:
        """The choice of a first chunk."""
        return self.delta(choice, {"role": "assistant", "content": ""})

    def more(self, choice: Choice, text: str, told: Sequence[Told]) -> dict[str, Any]:
        """The choice of a chunk that brings ``text``."""
        return self.delta(choice, {"content": text}) | {"logprobs": self._logprobs(told)}

    def end(self, choice: Choice) -> dict[str, Any]:
        """The choice of its last chunk."""
        return self.delta(choice, {}) | finish(choice.ended)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        message = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": None}
        told = self._logprobs(choice.told)
        return {"index": choice.index, "message": message, "logprobs": told} | finish(choice.ended)

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
        if not told:
            return None
        content = []
        for token, told_of in told:
            top = zip(told_of.top_ids, told_of.top_logprobs, strict=True)
            named = [self._named(other, logprob) for other, logprob in top]
            content.append(self._named(token, told_of.logprob) | {"top_logprobs": named})
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._piece(token)
        return {"token": shown(piece), "logprob": logprob, "bytes": list(piece)}
