"""A tokenizer that a test can read, and a model for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyramidserve.chat import Chat
from pyramidserve.types import Constraint
from workers.budget.span import Span
from workers.model.shapes import SHAPES
from workers.model.spans import instruction_spans
from workers.model.transcript import Transcript
from workers.tools.forms import HERMES

CONTEXT, VOCABULARY = 300, 100
FACTS = replace(
    SHAPES["toy"],
    layers=2,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_size=4,
    intermediate=8,
    vocabulary=VOCABULARY,
    tied_embeddings=True,
    context=CONTEXT,
)


class AnyGrammar:
    """Holds nothing against any."""

    def check(self, constraint: Constraint, output_ids: Sequence[int] = ()) -> None:
        pass


class Letters:
    """A token a letter, behind one that begins the text."""

    characters_per_token = 1

    def encode(self, text: str) -> list[int]:
        return [0, *(ord(letter) % VOCABULARY for letter in text)]

    calls = HERMES

    def chat(self, chat: Chat, last: Transcript | None = None) -> list[int]:
        going_on = last.go_on(self, chat) if last else None
        return going_on or self.encode(self.render(chat))

    def instructions(self, chat: Chat, ids: Sequence[int]) -> tuple[Span, ...]:
        return instruction_spans(chat.messages, ids, self.piece)

    def render(self, chat: Chat) -> str:
        text = "".join(f"{tool.name}!" for tool in chat.tools.tools)
        text += "".join(f"{each.role}:{each.said};" for each in chat.messages)
        return text[:-1] if chat.continues else text

    def call_mark(self, text: str) -> str:
        return repr(text)

    def plain(self, content: str) -> str:
        return content

    def encode_part(self, text: str) -> list[int]:
        return self.encode(text)[1:]

    def piece(self, token: int) -> bytes:
        return self.decode([token]).encode()

    def about(self) -> dict[str, Any]:
        return {"tokenizer_class": "Letters", "eos_token": ";"}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def decode_special(self, token: int) -> str:
        return ""
