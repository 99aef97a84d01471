"""What is measured of a cell, part by part: the same texts and questions for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Protocol

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import ChatMessage, Compression
from workers.bench.cell import Holding
from workers.bench.facts import TALK_TOKENS, Asking, Fact, Talk
from workers.bench.instructions import CHAT_TOKENS, AnswerPart, InstructedChat
from workers.bench.problems import Problem
from workers.bench.tasks import Item
from workers.bench.texts import windows
from workers.model.tokenizer import Tokenizer

# As JSON has it.
Record = dict[str, Any]
# The ids of a first question about a document and of the full cache's reply, and what is asked behind it.
Begun = tuple[list[int], list[int], tuple[Fact, ...]]
# The ids of a first question, those of all that comes behind it, and which of these are wanted.
Told = tuple[list[int], list[int], list[slice]]
# Is told how many tokens of prompts have been read.
Done = Callable[[int], None]
FULL, SESSION = Compression(), "task"
# Passages that an engine reads at once.
AT_ONCE = 16
# Of tasks: whether the prompt is compressed with its question, or the context alone.
SEEN, UNSEEN = "seen", "unseen"


@dataclass(frozen=True)
class Passage:
    """A prompt, and what is read behind it."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


class Read(Protocol):
    """How likely a passage's output was; see ``Likelihood``."""

    @property
    def log_probabilities(self) -> Sequence[float]: ...
    @property
    def likeliest(self) -> Sequence[int]: ...
    @property
    def kept(self) -> float: ...


class Part(Protocol):
    """What is measured of a cell.

    Attributes:
        prompt_tokens: that a cell reads, about.
        longest: tokens of its longest sequence, at most.
    """

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def longest(self) -> int: ...

    def begin(self, asking: Asking) -> None:
        """Asks the baseline's engine what all cells share, before anything is measured."""
        ...

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        """What is found; ``full`` is what the baseline has found, None where this is the baseline."""
        ...


class Passages:
    """How likely text is behind a compressed prompt, and how often the full cache's choice is chosen."""

    def __init__(self, sets: Mapping[str, Sequence[Passage]]) -> None:
        self.sets = sets
        every = [each for passages in sets.values() for each in passages]
        self.prompt_tokens = sum(len(each.prompt_ids) for each in every)
        self.longest = max(len(each.prompt_ids) + len(each.output_ids) for each in every)

    def begin(self, asking: Asking) -> None:
        """Nothing."""

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        found = {}
        for name, passages in self.sets.items():
            reads: list[Read] = []
            for first in range(0, len(passages), AT_ONCE):
                some = passages[first : first + AT_ONCE]
                reads += asking.judge.read_all(
                    [
                        (each.prompt_ids, each.output_ids, holding.asks(len(each.prompt_ids)))
                        for each in some
                    ]
                )
                done(sum(len(each.prompt_ids) for each in some))
            fixed = mean(holding.fixed(len(each.prompt_ids)) for each in passages)
            found[name] = passages_record(reads, full and full[name]) | {"fixed": fixed}
        return found


def passages_record(reads: Sequence[Read], full: Record | None) -> Record:
    """Of each passage its tokens, the nats that they are found unlikely by, and the share where the
    likeliest is the full cache's."""
    likeliest = [" ".join(map(str, read.likeliest)) for read in reads]
    told: Record = {
        "kept": mean(read.kept for read in reads),
        "tokens": [len(read.likeliest) for read in reads],
        "nats": [round(-sum(read.log_probabilities), 4) for read in reads],
    }
    if full is None:
        return told | {"likeliest": likeliest}
    pairs = zip(likeliest, full["likeliest"], strict=True)
    return told | {"agree": [_agreement(own.split(), other.split()) for own, other in pairs]}


def _agreement(own: Sequence[str], other: Sequence[str]) -> float:
    return round(mean(a == b for a, b in zip(own, other, strict=True)), 4)


class Facts:
    """What is kept of a document's facts that are asked for in later turns."""

    def __init__(self, held: Sequence[Talk], tokens: int) -> None:
        """Talks about documents of ``tokens`` tokens."""
        self._held = held
        self._begun: list[Begun] = []
        self._without: list[float] = []
        self.told: list[Told] = []
        self.prompt_tokens = len(held) * tokens
        self.longest = tokens + TALK_TOKENS

    def begin(self, asking: Asking) -> None:
        """The full cache's first replies, and how likely the answers are without the documents."""
        self._begun = [(*asking.begin(talk.document), talk.asked) for talk in self._held]
        self.told = [_told(asking, begun) for begun in self._begun]
        for talk in self._held:
            answers = _answers(asking, (*asking.begin(""), talk.asked), FULL)
            self._without += [each["log_probability"] for each in answers]

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        answers = []
        for begun in self._begun:
            answers += _answers(asking, begun, holding.asks(len(begun[0])))
            done(self.prompt_tokens // len(self._begun))
        found = [each["log_probability"] for each in answers]
        return self.record(found, mean(each["device_share"] for each in answers)) | {
            "fixed": mean(holding.fixed(len(ids)) for ids, _, _ in self._begun),
        }

    def record(self, found: Sequence[float], kept: float) -> Record:
        """Of each question the nats by which its document makes the answer likelier."""
        pairs = zip(found, self._without, strict=True)
        return {"kept": kept, "gains": [round(own - without, 4) for own, without in pairs]}


def _answers(asking: Asking, begun: Begun, compression: Compression) -> list[dict[str, Any]]:
    ids, reply, asked = begun
    return asking.ask(ids, reply, asked, compression)


def _told(asking: Asking, begun: Begun) -> Told:
    ids, reply, asked = begun
    behind, wanted = list(reply), []
    for turn in asking.turns(asked):
        behind += [*turn.question_ids, *turn.reply_ids]
        wanted.append(slice(len(behind) - len(turn.reply_ids) + turn.given, len(behind)))
    return ids, behind, wanted


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


class Tasks:
    """How much likelier a context makes the answers, where the question is compressed with it and where it
    comes as the next turn of a session."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self._without: dict[str, float] = {}
        self.prompt_tokens = 2 * sum(len(each.prompt_ids) for each in items)
        self.longest = max(len(each.prompt_ids) + len(each.answer_ids) for each in items)

    def begin(self, asking: Asking) -> None:
        """How likely the answers are without the contexts."""
        for each in self.items:
            read = asking.judge.read(each.question_ids, each.answer_ids, FULL)
            self._without[each.name] = read.total

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        found: Record = {}
        for way in (SEEN, UNSEEN):
            reads = []
            for item in self.items:
                compression = holding.asks(len(item.prompt_ids))
                if way == UNSEEN:
                    context = item.prompt_ids[: item.context_tokens]
                    # The turn ends with what follows, so that both ways read the same.
                    ends = item.prompt_ids[item.context_tokens : item.context_tokens + 1]
                    asking.judge.read(context, ends, compression, SESSION)
                reads.append(asking.judge.read(item.prompt_ids, item.answer_ids, compression, SESSION))
                asking.judge.end(SESSION)
                done(len(item.prompt_ids))
            fixed = mean(holding.fixed(len(item.prompt_ids)) for item in self.items)
            found[way] = self.record(reads) | {"fixed": fixed}
        return found

    def record(self, reads: Sequence[Read]) -> Record:
        """Of each task the nats by which its context makes the answer likelier."""
        gains = {
            item.name: round(sum(read.log_probabilities) - self._without[item.name], 4)
            for item, read in zip(self.items, reads, strict=True)
        }
        return {"kept": mean(read.kept for read in reads), "gains": gains}


def text_passages(
    tokenizer: Tokenizer, prompts: Sequence[int], goes_on: int, texts: int
) -> dict[str, list[Passage]]:
    """Of each length so many texts. Raises InvalidRequestError where there are fewer."""
    sets = {}
    for tokens in prompts:
        pieces = windows(tokenizer, tokens + goes_on, texts)
        if len(pieces) < texts:
            raise InvalidRequestError(
                f"--texts is {texts}; what every Python brings along has {len(pieces)} of --prompts "
                f"{tokens} and --goes-on {goes_on}: give less"
            )
        sets[str(tokens)] = [Passage(each[:tokens], each[tokens:]) for each in pieces]
    return sets


def problem_passages(tokenizer: Tokenizer, problems: Sequence[Problem]) -> dict[str, list[Passage]]:
    """The authors' solutions behind HumanEval's prompts."""
    return {
        "humaneval": [
            Passage(tokenizer.encode(each.prompt), tokenizer.encode_part(each.solution))
            for each in problems
        ]
    }
