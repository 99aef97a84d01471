"""Text to token ids and back."""

import json
from collections.abc import Sequence
from copy import copy
from itertools import groupby
from pathlib import Path
from typing import Any

from pyramidserve.chat import Chat
from pyramidserve.errors import CheckpointError, InvalidRequestError
from pyramidserve.types import ChatMessage
from workers.budget.span import Span
from workers.model.config import ModelConfig
from workers.model.control_tokens import ControlTokens
from workers.model.longest_token import characters_per_token
from workers.model.pieces import Pieces
from workers.model.sentencepiece_model import has_model_alone, tokenizer_of_model
from workers.model.spans import instruction_spans
from workers.model.transcript import Transcript
from workers.tools.forms import HERMES, CallForm, form_of
from workers.tools.told import described, told_in_messages


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Control tokens are those that the tokenizer calls special, and others that its chat template writes.
    Where a message has typed one it is encoded as text, unless it is wanted there.

    Attributes:
        calls: the form in which the model calls tools; None: in none that is known here.
        characters_per_token: see ``workers.model.longest_token``; None: nothing is known of it.
    """

    def __init__(self, checkpoint: Path, control_tokens_in_messages: bool = False) -> None:
        """Raises CheckpointError when the checkpoint has no tokenizer.

        Args:
            control_tokens_in_messages: those that a message has typed count as such.
        """
        from transformers import AutoTokenizer

        try:
            load = tokenizer_of_model if has_model_alone(checkpoint) else AutoTokenizer.from_pretrained
            self._tokenizer = load(checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises just that
            raise CheckpointError(f"the tokenizer of {checkpoint} cannot be read: {error}") from error
        self._backend = backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self.characters_per_token = None if backend is None else characters_per_token(backend)
        added = self._tokenizer.added_tokens_decoder
        self._special = {token: str(each) for token, each in added.items() if each.special}
        template = self._template()
        # Where the template knows of no tools, messages tell of them.
        self._tells = "tools" not in template
        self.calls: CallForm | None = HERMES if self._tells else form_of(template)
        # What calls consist of is text, also where the tokenizer calls it special.
        marks = (self.calls.opens, *self.calls.marks) if self.calls else ()
        self._marks = {token: text for token, text in self._special.items() if text in marks}
        control = [str(each) for each in added.values() if each.special or str(each).strip() in template]
        self._pieces = None if backend is None else Pieces(backend)
        self._control = None if control_tokens_in_messages else ControlTokens(filter(str.strip, control))

    @property
    def end_id(self) -> int | None:
        """What ends a text, if anything does."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    @property
    def serialised(self) -> str | None:
        """As the tokenizers library writes it, without padding and truncation; None: it is none of that."""
        if self._backend is None:
            return None
        alone = copy(self._backend)
        alone.no_padding()
        alone.no_truncation()
        return str(alone.to_str())

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for, special tokens too."""
        return self._pieces(token) if self._pieces else self.decode([token]).encode()

    def about(self) -> dict[str, Any]:
        """What programs that tokenise by themselves must know, by transformers' names."""
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        template = self._tokenizer.chat_template
        return {"tokenizer_class": type(self._tokenizer).__name__, "chat_template": template, **special}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, control tokens included, with what the model wants in front, once."""
        ids: list[int] = self._tokenizer(text).input_ids
        begin = self._tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def encode_part(self, text: str) -> list[int]:
        """Ids of ``text`` as it stands, with nothing in front; what was made ``plain`` stays that."""
        from transformers.utils.chat_template_utils import encode_marked_chat

        if self._control is None:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
            return ids
        try:
            ids = encode_marked_chat(self._tokenizer, text)
        except ValueError as error:
            raise InvalidRequestError(f"a message cannot be encoded as text: {error}") from error
        return ids

    def chat(self, chat: Chat, last: Transcript | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant speaks next, or goes on speaking.

        Args:
            last: a turn; where the conversation goes on from it, its own ids come first.

        Raises InvalidRequestError when the model has no chat template or the template refuses.
        """
        going_on = last.go_on(self, chat) if last else None
        return going_on or self.encode_part(self.render(chat))

    def instructions(self, chat: Chat, ids: Sequence[int]) -> tuple[Span, ...]:
        """Which of the ``ids`` of a conversation give instructions, in order."""
        return instruction_spans(chat.messages, ids, self.piece)

    def render(self, chat: Chat) -> str:
        """The text that ``chat`` gives the ids of, contents made ``plain``. Raises as ``chat`` does."""
        import jinja2

        tools, messages = chat.tools.tools, chat.messages
        if self._tells:
            tools, messages = (), told_in_messages(messages, tools)
        try:
            text = self._tokenizer.apply_chat_template(
                [self._turn(message) for message in messages],
                tools=[described(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=not chat.continues,
                continue_final_message=chat.continues,
                **chat.variables,
            )
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise InvalidRequestError(
                f"the conversation does not fit the model's chat template: {error}"
            ) from error
        return str(text)

    def call_mark(self, text: str) -> str:
        """What the form of calls has for its own, as grammars name it."""
        token = next((token for token, mark in self._marks.items() if mark == text), None)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def plain(self, content: str) -> str:
        """What a message says, marked so that ``encode_part`` takes it as text alone."""
        return content if self._control is None else self._control.mark(content)

    def decode_special(self, token: int) -> str:
        """The text of a special token; nothing of another."""
        return self._special.get(token, "")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out but for those that calls of tools consist of."""
        if not self._marks.keys().isdisjoint(ids):
            parts = groupby(ids, key=self._marks.get)
            return "".join(mark * len(list(own)) if mark else self.decode(list(own)) for mark, own in parts)
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _template(self) -> str:
        """The chat template for conversations with tools; "": there is none."""
        templates = self._tokenizer.chat_template or ""
        if isinstance(templates, str):
            return templates
        return str(templates.get("tool_use") or templates.get("default") or "")

    def _turn(self, message: ChatMessage) -> dict[str, Any]:
        """A message as templates read it, with nothing in it that could be a control token."""
        turn: dict[str, Any] = {"role": message.role, "content": self.plain(message.content)}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._plain_json(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id
        return turn

    def _plain_json(self, text: str) -> Any:
        """Arguments of a call as templates read them, with plain texts; "" is none."""
        try:
            return self._plain_value(json.loads(text or "{}"))
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"arguments of a call are {text!r:.80}, which is no JSON: {error}"
            ) from error

    def _plain_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.plain(value)
        if isinstance(value, list):
            return [self._plain_value(each) for each in value]
        if isinstance(value, dict):
            return {self.plain(name): self._plain_value(each) for name, each in value.items()}
        return value


def end_ids(model: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """All that ends a reply, by the model's configurations and by the tokenizer."""
    return {*model.eos_ids, *(() if tokenizer.end_id is None else (tokenizer.end_id,))}
