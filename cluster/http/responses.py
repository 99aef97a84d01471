"""Replies as /v1/responses has them: text and calls, and nothing is kept."""

import json
from collections.abc import Sequence
from typing import Any

from cluster.http.choice import Choice, Told, told, usage
from cluster.http.errors import shape_of
from cluster.http.pieces import Piece
from cluster.http.reply import Names, event
from cluster.http.response_bodies import ResponseBody
from cluster.http.response_items import CallItem, Events, MessageItem, OutputItem
from pyramidserve.errors import PyramidServeError
from pyramidserve.tools import ToolCallPart
from pyramidserve.types import FinishReason, Receipt, Tokens


class ResponseReply:
    """The reply to one request; the names of its events are OpenAI's."""

    done = b""

    def __init__(self, names: Names, body: ResponseBody, piece: Piece) -> None:
        self._names, self._piece = names, piece
        self._asked = body.model_dump(include={"instructions", "tools", "tool_choice"})
        self._parallel = body.parallel_tool_calls is not False
        self._choice = Choice(0, 0)
        self._items: list[OutputItem] = []
        self._message: MessageItem | None = None
        self._calls: dict[int, CallItem] = {}
        self._untold: list[Told] = []  # of output whose text is still to come
        self._sequence = 0

    @property
    def choices(self) -> Sequence[Choice]:
        """The one there is."""
        return (self._choice,)

    def begin(self, choice: Choice) -> bytes:
        """What comes before the first output."""
        response = self._response("in_progress")
        return self._events([("created", {"response": response}), ("in_progress", {"response": response})])

    def add(self, choice: Choice, tokens: Tokens) -> bytes:
        """Takes output in."""
        before = len(choice.told)
        choice.take(tokens)
        self._untold += choice.told[before:]
        events: Events = []
        if tokens.text:
            events += self._say(tokens.text)
        if tokens.tool_calls:
            self._untold = []  # calls have none
            for part in tokens.tool_calls:
                events += self._call(part)
        return self._events(events)

    def end(self, choice: Choice, receipt: Receipt) -> bytes:
        """Takes the end in."""
        choice.receipt = receipt
        last = self._items[-1] if self._items else None
        unsaid = last is None or (last is self._message and self._untold)
        events, whole = self._say("") if unsaid else [], self.whole()
        for number, (item, shape) in enumerate(zip(self._items, whole["output"], strict=True)):
            events += item.ended()
            events.append(("output_item.done", {"item": shape, "output_index": number}))
        events.append((str(whole["status"]), {"response": whole}))
        return self._events(events)

    def fail(self, error: PyramidServeError) -> bytes:
        """The end of a stream that has begun."""
        response = self._response("failed") | {"error": shape_of(error)["error"]}
        return self._events([("failed", {"response": response})])

    def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        receipt = self._choice.ended
        cut = receipt.finish_reason is FinishReason.LENGTH
        read = usage([self._choice])
        *before, last = self._items
        return self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [
                *(each.shape("completed") for each in before),
                last.shape("incomplete" if cut else "completed"),
            ],
            "usage": {
                "input_tokens": read["prompt_tokens"],
                "input_tokens_details": read["prompt_tokens_details"],
                "output_tokens": read["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read["total_tokens"],
            },
            "pyramidserve": told([self._choice]),
        }

    def _say(self, text: str) -> Events:
        events: Events = []
        message = self._message
        if message is None:
            message = MessageItem(self._name("msg-"), len(self._items), self._piece)
            self._message = message
            events = [*self._added(message), *message.began()]
        events += message.add(text, self._untold)
        self._untold = []
        return events

    def _call(self, part: ToolCallPart) -> Events:
        events: Events = []
        call = self._calls.get(part.index)
        if call is None:
            call = CallItem(f"{self._name('fc-')}-{part.index}", len(self._items), part)
            self._calls[part.index] = call
            events = self._added(call)
        return events + call.add(part.arguments)

    def _added(self, item: OutputItem) -> Events:
        place = len(self._items)
        self._items.append(item)
        return [("output_item.added", {"item": item.shape("in_progress"), "output_index": place})]

    def _name(self, prefix: str) -> str:
        return self._names.name.replace("resp-", prefix, 1)

    def _response(self, status: str) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self._names.name,
            "object": "response",
            "created_at": self._names.created,
            "model": self._names.model,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked["instructions"],
            "output": [],
            "parallel_tool_calls": self._parallel,
            "tool_choice": asked["tool_choice"] or "auto",
            "tools": asked["tools"] or [],
            "store": False,
            "usage": None,
        }

    def _events(self, events: Events) -> bytes:
        said = []
        for kind, facts in events:
            name = f"response.{kind}"
            said.append(event(json.dumps({"type": name, "sequence_number": self._sequence} | facts), name))
            self._sequence += 1
        return b"".join(said)
