"""Replies as /v1/responses has them: text alone, and nothing is kept."""

import json
from collections.abc import Sequence
from typing import Any

from cluster.http.choice import Choice, told, usage
from cluster.http.errors import shape_of
from cluster.http.pieces import Piece, likely
from cluster.http.reply import Names, event
from pyramidserve.errors import PyramidServeError
from pyramidserve.types import FinishReason, Receipt, Tokens


class ResponseReply:
    """The reply to one request; the names of its events are OpenAI's."""

    done = b""

    def __init__(self, names: Names, instructions: str | None, piece: Piece) -> None:
        self._names, self._instructions, self._piece = names, instructions, piece
        self._choice = Choice(0, 0)
        self._item = names.name.replace("resp-", "msg-", 1)
        self._sequence = 0

    @property
    def choices(self) -> Sequence[Choice]:
        """The one there is."""
        return (self._choice,)

    def begin(self, choice: Choice) -> bytes:
        """What comes before the first text."""
        response, place = self._response("in_progress"), {"output_index": 0}
        return b"".join(
            (
                self._event("created", response=response),
                self._event("in_progress", response=response),
                self._event("output_item.added", item=self._message("in_progress"), **place),
                self._event("content_part.added", part=self._part(""), **self._place),
            )
        )

    def add(self, choice: Choice, tokens: Tokens) -> bytes:
        """Takes output in."""
        before = len(choice.told)
        choice.take(tokens)
        told = likely(self._piece, choice.told[before:])
        if not (tokens.text or told):
            return b""
        return self._event("output_text.delta", delta=tokens.text, logprobs=told, **self._place)

    def end(self, choice: Choice, receipt: Receipt) -> bytes:
        """Takes the end in."""
        choice.receipt, text = receipt, choice.text
        whole, place = self.whole(), {"output_index": 0}
        part = self._part(text)
        return b"".join(
            (
                self._event("output_text.done", text=text, logprobs=part["logprobs"], **self._place),
                self._event("content_part.done", part=part, **self._place),
                self._event("output_item.done", item=whole["output"][0], **place),
                self._event(str(whole["status"]), response=whole),
            )
        )

    def fail(self, error: PyramidServeError) -> bytes:
        """The end of a stream that has begun."""
        response = self._response("failed") | {"error": shape_of(error)["error"]}
        return self._event("failed", response=response)

    def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        receipt = self._choice.ended
        cut = receipt.finish_reason is FinishReason.LENGTH
        read = usage([self._choice])
        return self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message("incomplete" if cut else "completed", self._choice.text)],
            "usage": {
                "input_tokens": read["prompt_tokens"],
                "input_tokens_details": read["prompt_tokens_details"],
                "output_tokens": read["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read["total_tokens"],
            },
            "pyramidserve": told([self._choice]),
        }

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._names.name,
            "object": "response",
            "created_at": self._names.created,
            "model": self._names.model,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self._instructions,
            "output": [],
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": False,
            "usage": None,
        }

    def _message(self, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {
            "type": "message",
            "id": self._item,
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, text: str) -> dict[str, Any]:
        told = likely(self._piece, self._choice.told)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": told}

    def _event(self, kind: str, **facts: Any) -> bytes:
        name = f"response.{kind}"
        said = event(json.dumps({"type": name, "sequence_number": self._sequence} | facts), name)
        self._sequence += 1
        return said
