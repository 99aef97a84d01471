"""What a turn of a conversation consisted of, so that the next can go on with the same tokens."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pyramidserve.types import ChatMessage
from workers.model.vocabulary import Vocabulary, text_behind


class Text(Vocabulary, Protocol):
    """What going on needs of a tokenizer; see ``workers.model.tokenizer``."""

    def render(self, messages: Sequence[ChatMessage], continues: bool | None = None) -> str:
        """The text of a conversation, up to where the assistant speaks next, or goes on speaking."""
        ...

    def plain(self, content: str) -> str:
        """What a message says, as ``render`` writes it."""
        ...

    def encode_part(self, text: str) -> list[int]:
        """Ids of ``text`` as it stands, with nothing in front."""
        ...


@dataclass(frozen=True)
class Transcript:
    """One turn: what was asked, and the ids that the model read and wrote.

    Attributes:
        messages: the conversation up to the reply.
        begun: what of the reply was asked for already.
        reply: the text behind that; shorter than that of ``output_ids`` where a stop string ended it.
        prompt_ids, output_ids: int32.
    """

    messages: tuple[ChatMessage, ...]
    begun: str
    reply: str
    prompt_ids: "array[int]"
    output_ids: "array[int]"

    @classmethod
    def of(
        cls,
        messages: tuple[ChatMessage, ...],
        continues: bool,
        reply: str,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
    ) -> "Transcript":
        """A turn that ``messages`` asked for; with ``continues``, the last of them began the reply."""
        asked, begun = (messages[:-1], messages[-1].content) if continues else (messages, "")
        return cls(asked, begun, reply, array("i", prompt_ids), array("i", output_ids))

    @property
    def conversation(self) -> tuple[ChatMessage, ...]:
        """All that was said, the reply too."""
        return (*self.messages, ChatMessage("assistant", self.begun + self.reply))

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        ids = len(self.prompt_ids) + len(self.output_ids)
        return 4 * ids + sum(len(each.content) for each in self.conversation)

    def go_on(
        self, text: Text, messages: Sequence[ChatMessage], continues: bool | None = None
    ) -> list[int] | None:
        """Ids of a conversation that goes on from here; None where it does not.

        The turn's own ids, and then those of the text behind the reply: tokenising the reply rarely gives
        the ids back that the model wrote.
        """
        asked, so_far = len(self.messages), self.conversation
        whole, before = (
            text.render(messages, continues),
            text.render(self.messages, False) + text.plain(so_far[-1].content),
        )
        if tuple(messages[: asked + 1]) != so_far or not whole.startswith(before):
            return None
        output, rest = list(self.output_ids), whole[len(before) :]
        while not self.reply.startswith(written := text_behind(text, self.prompt_ids, output)):
            output.pop()
        if output and (closing := text.decode_special(output[-1])):
            if rest.startswith(closing):
                rest = rest[len(closing) :]
            else:
                output.pop()
        return [*self.prompt_ids, *output, *text.encode_part(text.plain(self.reply[len(written) :]) + rest)]
