"""Facts in a document that a first question is not about, and later ones are."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import ChatMessage, Compression, Stopping
from workers.bench.likelihood import Judge, Likelihood
from workers.bench.texts import windows
from workers.engine.engine import Engine, EngineRequest
from workers.model.tokenizer import Tokenizer

NAMES = (
    *("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo"),
    *("Irene", "Jonas", "Karin", "Leo", "Maria", "Nils", "Olga", "Peter"),
)
THINGS = (
    *("key", "map", "ring", "clock", "violin", "diary", "lamp"),
    *("coat", "telescope", "passport", "camera", "sword", "kettle", "globe"),
)
PLACES = (
    *("Lisbon", "Cairo", "Oslo", "Vienna", "Madrid", "Tokyo", "Boston"),
    *("Dublin", "Athens", "Prague", "Geneva", "Havana", "Delhi", "Rome"),
)
FACTS, LATER_TURNS = 12, 4
FIRST_QUESTION = "What is this text about? Answer in one sentence."
# Stands for a reply where turns are rendered; nothing else has it.
REPLY = "¤"
SESSION = "talk"
# What facts, questions and answers add to a document at most, a token a byte.
TALK_TOKENS = 1024


@dataclass(frozen=True)
class Fact:
    """Somebody keeps something somewhere."""

    name: str
    thing: str
    place: str

    @property
    def sentence(self) -> str:
        return f" {self.name} keeps the {self.thing} in {self.place}."

    @property
    def question(self) -> str:
        return f"Where does {self.name} keep the {self.thing}?"

    @property
    def answer(self) -> tuple[str, str]:
        """What is given of it, and what is wanted."""
        return f"{self.name} keeps the {self.thing} in", f" {self.place}"


@dataclass(frozen=True)
class Talk:
    """A document with facts, and those that are asked about in later turns."""

    document: str
    asked: tuple[Fact, ...]


@dataclass(frozen=True)
class Turn:
    """The ids of a question, from the reply before it on, and of its answer, of which so many are given."""

    question_ids: list[int]
    reply_ids: list[int]
    given: int


def talks(tokenizer: Tokenizer, tokens: int, count: int, seed: int) -> list[Talk]:
    """Documents of about ``tokens`` tokens, facts planted behind words all over them.

    There may be fewer, as the reference ends. Raises InvalidRequestError where they are too short.
    """
    return planted(windows(tokenizer, tokens, count), tokenizer, seed)


def planted(texts: Sequence[Sequence[int]], tokenizer: Tokenizer, seed: int) -> list[Talk]:
    """Documents that are ``texts``, as ``talks`` has them. Raises InvalidRequestError."""
    draw = random.Random(seed)
    made = []
    for text in texts:
        facts = [
            Fact(*each)
            for each in zip(
                draw.sample(NAMES, FACTS),
                draw.sample(THINGS, FACTS),
                draw.sample(PLACES, FACTS),
                strict=True,
            )
        ]
        words = tokenizer.decode(text).split(" ")
        if len(words) < FACTS:
            raise InvalidRequestError(
                f"a document of {len(text)} tokens has {len(words)} words; {FACTS} facts need more: "
                "give more tokens"
            )
        for fact, at in zip(
            facts, sorted(draw.sample(range(len(words)), FACTS), reverse=True), strict=True
        ):
            words[at] += "." + fact.sentence
        made.append(Talk(" ".join(words), tuple(draw.sample(facts, LATER_TURNS))))
    return made


class Asking:
    """Holds talks with an engine, the same words in every mode.

    Attributes:
        judge: reads with the engine; tokenizer: the engine's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self.judge = engine, Judge(engine)
        self.tokenizer = engine.tokenizer

    def begin(self, document: str) -> tuple[list[int], list[int]]:
        """The ids of a first question about a document, and of the full cache's reply."""
        asked = f"{document}\n\n{FIRST_QUESTION}" if document else FIRST_QUESTION
        ids = self.tokenizer.chat(Chat.of([ChatMessage("user", asked)]))
        (reply,) = self._engine.generate([EngineRequest(ids, stopping=Stopping(max_tokens=32))])
        return ids, [token for token in reply.token_ids if not self.tokenizer.decode_special(token)]

    def ask(
        self, ids: list[int], reply: list[int], turns: Sequence[Turn], compression: Compression
    ) -> list[dict[str, Any]]:
        """A talk: the first turn, then ``turns``. What became of the answers."""
        self.judge.read(ids, reply, compression, SESSION)
        answers = []
        for turn in turns:
            ids = [*ids, *reply, *turn.question_ids]
            reply = turn.reply_ids
            answers.append(_answer(self.judge.read(ids, reply, compression, SESSION), reply, turn.given))
        self.judge.end(SESSION)
        return answers

    def turns(self, facts: Sequence[Fact]) -> list[Turn]:
        """A question about each of ``facts``, in words that are the same in every talk."""
        turns = []
        for fact in facts:
            given, wanted = map(self.tokenizer.encode_part, fact.answer)
            turns.append(Turn(self._between(fact.question), [*given, *wanted], len(given)))
        return turns

    def _between(self, question: str) -> list[int]:
        """The ids between a reply and the next one, as the chat template has them."""
        before = [ChatMessage("user", FIRST_QUESTION), ChatMessage("assistant", REPLY)]
        text = self.tokenizer.render(Chat.of([*before, ChatMessage("user", question)]))
        return self.tokenizer.encode_part(text.rpartition(REPLY)[2])


def _answer(read: Likelihood, reply: list[int], given: int) -> dict[str, Any]:
    return {
        "log_probability": round(sum(read.log_probabilities[given:]), 4),
        "exact": list(read.likeliest[given:]) == reply[given:],
        "device_share": round(read.kept, 4),
        "reused": round(read.receipt.reused_tokens / read.receipt.prompt_tokens, 4),
        "recalled_bytes": read.receipt.recalled_bytes,
    }
