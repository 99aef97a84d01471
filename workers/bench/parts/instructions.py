"""What is kept of a system message's instructions."""

from collections.abc import Sequence
from statistics import mean

from pyramidserve.chat import Chat
from pyramidserve.types import ChatMessage, Compression
from workers.bench.cell import Holding
from workers.bench.facts import Asking
from workers.bench.instructions import CHAT_TOKENS, AnswerPart, InstructedChat
from workers.bench.parts.part import AT_ONCE, FULL, Done, Read, Record


class Instructions:
    """What is kept of a system message's instructions, and of what the user asks for behind them."""

    def __init__(self, chats: Sequence[InstructedChat], tokens: int) -> None:
        """Chats about documents of ``tokens`` tokens."""
        self._chats = chats
        self._without: list[list[float]] = []
        self.prompt_tokens = len(chats) * tokens
        self.longest = tokens + CHAT_TOKENS

    def begin(self, asking: Asking) -> None:
        """How likely the answers are without instructions and documents."""
        reads = _read_answers(asking, [(chat.bare, chat.answer, FULL) for chat in self._chats])
        self._without = [found for found, _ in reads]

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        lengths = [len(asking.tokenizer.chat(Chat.of(chat.messages))) for chat in self._chats]
        asked = [
            (chat.messages, chat.answer, holding.asks(length))
            for chat, length in zip(self._chats, lengths, strict=True)
        ]
        gains: dict[bool, list[float]] = {True: [], False: []}
        reads = _read_answers(asking, asked)
        for chat, (found, _), without in zip(self._chats, reads, self._without, strict=True):
            for part, own, other in zip(chat.answer, found, without, strict=True):
                gains[part.instructed].append(round(own - other, 4))
        done(self.prompt_tokens)
        return {
            "kept": mean(kept for _, kept in reads),
            "fixed": mean(map(holding.fixed, lengths)),
            "gains": gains[True],
            "asked": gains[False],
        }


def _read_answers(
    asking: Asking,
    chats: Sequence[tuple[Sequence[ChatMessage], Sequence[AnswerPart], Compression]],
) -> list[tuple[list[float], float]]:
    """How likely what is wanted of each part of each answer is, and the share that stayed of the prompt."""
    encode, passages, places = asking.tokenizer.encode_part, [], []
    for messages, answer, compression in chats:
        ids: list[int] = []
        wanted = []
        for part in answer:
            ids += encode(part.given)
            first = len(ids)
            ids += encode(part.wanted)
            wanted.append(slice(first, len(ids)))
        passages.append((messages, ids, compression))
        places.append(wanted)
    reads: list[Read] = []
    for first in range(0, len(passages), AT_ONCE):
        reads += asking.judge.read_all(passages[first : first + AT_ONCE])
    return [
        ([sum(read.log_probabilities[place]) for place in wanted], read.kept)
        for read, wanted in zip(reads, places, strict=True)
    ]
