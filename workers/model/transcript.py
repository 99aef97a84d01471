"""What a turn of a conversation consisted of, so that the next can go on with the same tokens."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pyramidserve.types import ChatMessage


class Text(Protocol):
    """What going on needs of a tokenizer; see ``workers.model.tokenizer``."""

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a conversation, up to where the assistant speaks next."""
        ...

    def encode_part(self, text: str) -> list[int]:
        """Ids of ``text`` as it stands, with nothing in front."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        ...

    def decode_special(self, token: int) -> str:
        """The text of a special token; nothing of another."""
        ...


@dataclass(frozen=True)
class Transcript:
    """One turn: what was asked, and the ids that the model read and wrote.

    Attributes:
        messages: the conversation up to the reply.
        reply: its text; shorter than that of ``output_ids`` where a stop string ended it.
        prompt_ids, output_ids: int32.
    """

    messages: tuple[ChatMessage, ...]
    reply: str
    prompt_ids: "array[int]"
    output_ids: "array[int]"

    def go_on(self, text: Text, messages: Sequence[ChatMessage]) -> list[int] | None:
        """Ids of a conversation that goes on from here; None where it does not.

        The turn's own ids, and then those of the text behind the reply: tokenising the reply rarely gives
        the ids back that the model wrote.
        """
        asked = len(self.messages)
        so_far = (*self.messages, ChatMessage("assistant", self.reply))
        whole, before = text.render(messages), text.render(self.messages) + self.reply
        if tuple(messages[: asked + 1]) != so_far or not whole.startswith(before):
            return None
        output, rest = list(self.output_ids), whole[len(before) :]
        while not self.reply.startswith(written := text.decode(output)):
            output.pop()
        if output and (closing := text.decode_special(output[-1])):
            if rest.startswith(closing):
                rest = rest[len(closing) :]
            else:
                output.pop()
        return [*self.prompt_ids, *output, *text.encode_part(self.reply[len(written) :] + rest)]
