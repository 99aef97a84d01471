"""What a turn of a conversation consisted of, so that the next can go on with the same tokens."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import ToolCall
from pyramidserve.types import ChatMessage
from workers.model.vocabulary import Vocabulary, text_behind


class Text(Vocabulary, Protocol):
    """What going on needs of a tokenizer; see ``workers.model.tokenizer``."""

    def render(self, chat: Chat) -> str:
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
        chat: the conversation up to the reply.
        begun: what of the reply was asked for already.
        reply: the text behind that; shorter than that of ``output_ids`` where a stop string ended it.
        prompt_ids, output_ids: int32.
        calls: of tools, in the reply.
    """

    chat: Chat
    begun: str
    reply: str
    prompt_ids: "array[int]"
    output_ids: "array[int]"
    calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(
        cls,
        chat: Chat,
        reply: str,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        calls: tuple[ToolCall, ...] = (),
    ) -> "Transcript":
        """A turn that ``chat`` asked for, whose last message may have begun the reply."""
        begun = chat.messages[-1].content if chat.continues else ""
        asked = chat.messages[:-1] if chat.continues else chat.messages
        chat = replace(chat, messages=asked, continues=False)
        return cls(chat, begun, reply, array("i", prompt_ids), array("i", output_ids), calls)

    @property
    def conversation(self) -> tuple[ChatMessage, ...]:
        """All that was said, the reply too."""
        return (*self.chat.messages, ChatMessage("assistant", self.begun + self.reply, self.calls))

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        ids = len(self.prompt_ids) + len(self.output_ids)
        return 4 * ids + sum(len(each.said) for each in self.conversation)

    def go_on(self, text: Text, chat: Chat) -> list[int] | None:
        """Ids of a conversation that goes on from here; None where it does not.

        The turn's own ids, and then those of the text behind the reply: tokenising the reply rarely gives
        the ids back that the model wrote.
        """
        asked, so_far = len(self.chat.messages), self.conversation
        same_way = (chat.tools.tools, chat.variables) == (self.chat.tools.tools, self.chat.variables)
        if not same_way or not same(chat.messages[: asked + 1], so_far):
            return None
        # Calls stand as they were written, which templates would write in their own way.
        reply = text_behind(text, self.prompt_ids, self.output_ids) if self.calls else self.reply
        said = ChatMessage("assistant", self.begun + reply)
        written_out = replace(chat, messages=(*self.chat.messages, said, *chat.messages[asked + 1 :]))
        before = text.render(self.chat) + text.plain(said.content)
        try:
            whole = text.render(written_out)
        except InvalidRequestError:  # a template may want calls as such
            return None
        if not whole.startswith(before):
            return None
        output, rest = list(self.output_ids), whole[len(before) :]
        while not reply.startswith(written := text_behind(text, self.prompt_ids, output)):
            output.pop()
        if output and (closing := text.decode_special(output[-1])):
            if rest.startswith(closing):
                rest = rest[len(closing) :]
            else:
                output.pop()
        return [*self.prompt_ids, *output, *text.encode_part(text.plain(reply[len(written) :]) + rest)]


def same(messages: Sequence[ChatMessage], others: Sequence[ChatMessage]) -> bool:
    """Whether both say the same."""
    said, told = ([(each.role, each.said) for each in some] for some in (messages, others))
    return said == told
