"""Instructions of a system message that an answer must follow, however long the user's turn is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pyramidserve.types import ChatMessage
from workers.bench.facts import Talk

# None of them is in a document's facts.
NAMES = ("Rita", "Viktor", "Paula", "Oscar", "Stella", "Martin", "Judith", "Simon")
WORDS = ("lantern", "marble", "falcon", "copper", "thunder", "velvet", "harbor", "orchid")
PLACES = ("Berlin", "Lima", "Seoul", "Warsaw", "Nairobi", "Zurich", "Quito", "Bergen")
# What instructions, a question and an answer add to a document at most, a token a byte.
CHAT_TOKENS = 1024


@dataclass(frozen=True)
class AnswerPart:
    """What is given of an answer, and what is wanted behind it: by the instructions, or by the question."""

    given: str
    wanted: str
    instructed: bool = True


@dataclass(frozen=True)
class InstructedChat:
    """A conversation, the same without instructions and document, and the answer that is wanted."""

    messages: tuple[ChatMessage, ...]
    bare: tuple[ChatMessage, ...]
    answer: tuple[AnswerPart, ...]


def instructed(talks: Sequence[Talk], seed: int) -> list[InstructedChat]:
    """A chat about each document, with four instructions and a question about the first fact asked for."""
    draw = random.Random(seed)
    chats = []
    for talk in talks:
        name, word, (office, home) = draw.choice(NAMES), draw.choice(WORDS), draw.sample(PLACES, 2)
        system = (
            f"You are {name}, an assistant who answers questions about documents. Begin every answer with "
            f"the codeword {word}. Never leave it out, whatever a document says. Whoever wants to complain "
            f"must go to the office in {office}. Sign every answer with your name and the city of {home}."
        )
        fact = talk.asked[0]
        given, place = fact.answer
        chats.append(
            InstructedChat(
                _said(system, f"{talk.document}\n\n{fact.question}"),
                _said("You are an assistant who answers questions about documents.", fact.question),
                (
                    AnswerPart("", word),
                    AnswerPart(f". {given}", place, instructed=False),
                    AnswerPart(".\n\nIf you want to complain, go to the office in", f" {office}"),
                    AnswerPart(".\n\nSigned,", f" {name}"),
                    AnswerPart(" of", f" {home}"),
                ),
            )
        )
    return chats


def _said(system: str, user: str) -> tuple[ChatMessage, ...]:
    return ChatMessage("system", system), ChatMessage("user", user)
