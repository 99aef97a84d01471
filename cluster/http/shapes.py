"""Replies as OpenAI's API has them: whole, and in the chunks of a stream."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.http.errors import shape_of
from pyramidserve.errors import PyramidServeError
from pyramidserve.types import FinishReason, Receipt, TokenLogprob, Tokens

# An output id, and how likely it was; and what the ids stand for.
Told = tuple[int, TokenLogprob]
Piece = Callable[[int], bytes]
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
    told: list["Told"] = field(default_factory=list)
    receipt: Receipt | None = None

    def begin(self, prompt_tokens: int) -> None:
        """Takes the beginning in; what is given belongs to the prompt."""
        self.prompt_tokens, self.output_tokens = prompt_tokens + self.given, -self.given

    def take(self, tokens: Tokens) -> None:
        """Takes output in."""
        self.output_tokens += len(tokens.token_ids)
        self.parts.append(tokens.text)
        self.told += zip(tokens.token_ids, tokens.logprobs, strict=False)

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
        return self.delta(choice, {}) | _finish(choice.ended)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        message = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": None}
        told = self._logprobs(choice.told)
        return {"index": choice.index, "message": message, "logprobs": told} | _finish(choice.ended)

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


class CompletionShape:
    """Of /v1/completions.

    ``echoed``: what goes before the text of each prompt; ``unscored``: with log-probabilities, its ids.
    """

    whole = part = "text_completion"

    def __init__(
        self, piece: Piece, echoed: Sequence[str] = (), unscored: Sequence[Sequence[int]] = ()
    ) -> None:
        self._piece, self._echoed, self._unscored = piece, echoed, unscored
        self._offsets: Counter[int] = Counter()

    def begin(self, choice: Choice) -> dict[str, Any] | None:
        """The choice of a first chunk, if there is something to say."""
        echo = self._echo(choice)
        if not echo and not self._unscored:
            return None
        return self._part(choice, echo) | {"logprobs": self._logprobs(choice, self._before(choice))}

    def more(self, choice: Choice, text: str, told: Sequence[Told]) -> dict[str, Any]:
        """The choice of a chunk that brings ``text``."""
        return self._part(choice, text) | {"logprobs": self._logprobs(choice, told)}

    def end(self, choice: Choice) -> dict[str, Any]:
        """The choice of its last chunk."""
        return self._part(choice, "") | _finish(choice.ended)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        told = self._logprobs(choice, [*self._before(choice), *choice.told])
        part = self._part(choice, self._echo(choice) + choice.text)
        return part | {"logprobs": told} | _finish(choice.ended)

    def _part(self, choice: Choice, text: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def _echo(self, choice: Choice) -> str:
        return self._echoed[choice.prompt] if self._echoed else ""

    def _before(self, choice: Choice) -> list[tuple[int, TokenLogprob | None]]:
        """What has no probability, as nothing is before it or it is not asked for."""
        return [(token, None) for token in self._unscored[choice.prompt]] if self._unscored else []

    def _logprobs(
        self, choice: Choice, told: Sequence[tuple[int, TokenLogprob | None]]
    ) -> dict[str, Any] | None:
        if not told:
            return None
        tokens = [shown(self._piece(token)) for token, _ in told]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each and each.logprob for _, each in told],
            "top_logprobs": [each and self._top(token, each) for token, each in told],
            "text_offset": offsets,
        }

    def _top(self, token: int, told: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        own = ((token, told.logprob),)
        for other, logprob in (*zip(told.top_ids, told.top_logprobs, strict=True), *own):
            top.setdefault(shown(self._piece(other)), logprob)  # of those that look alike, the likelier
        return top


Shape = ChatShape | CompletionShape


def shown(piece: bytes) -> str:
    """The text of a token; of one that is part of a character, its bytes, so that no two look alike."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{each:02x}" for each in piece)


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


def told(choices: Sequence[Choice]) -> dict[str, Any]:
    """The receipt, or those of all choices, and of which sessions they were turns."""
    plain = [_plain(each) for each in choices]
    return plain[0] if len(plain) == 1 else {"receipts": plain}


def _plain(choice: Choice) -> dict[str, Any]:
    receipt = choice.ended
    own = {"finish_reason": receipt.finish_reason.value, "session_id": choice.session_id}
    return dataclasses.asdict(receipt) | own


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
        before = len(choice.told)
        choice.take(tokens)
        told = choice.told[before:]
        return self._chunk([self._shape.more(choice, tokens.text, told)]) if tokens.text or told else b""

    def end(self, choice: Choice, receipt: Receipt) -> bytes:
        """Takes the end of a choice in; its chunk, and those that end the stream if it was the last."""
        choice.receipt = receipt
        last = all(each.receipt for each in self.choices)
        receipts = told(self.choices) if last else None
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
            "pyramidserve": told(self.choices),
        }

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        rest: dict[str, Any] = {"choices": choices}
        if self._continuously:
            rest["usage"] = usage(self.choices)
        elif self._with_usage:
            rest["usage"] = None
        return event(self._begins + ", " + json.dumps(rest | (more or {}))[1:])
