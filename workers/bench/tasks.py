"""Generated tasks of any length, after RULER (arXiv 2404.06654, section 3 and appendix B).

Its questions are about paragraphs of SQuAD; here they are about facts in Python's reference, which every
Python has.
"""

import string
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product, takewhile
from pydoc_data.topics import topics
from random import Random

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import ChatMessage
from workers.bench.facts import NAMES, PLACES, THINGS, Fact
from workers.model.tokenizer import Tokenizer

ADJECTIVES = (
    *("brave", "calm", "clever", "cold", "crisp", "dark", "eager", "fancy", "gentle", "grand"),
    *("heavy", "humble", "jolly", "lucky", "plain", "proud", "quick", "quiet", "rusty", "shiny"),
)
NEEDLES, HOPS, COMMON, FREQUENT = 4, 4, 10, 3
# Of coded words the next is so many times as rare (RULER's alpha).
RARER = 2.0


@dataclass(frozen=True)
class Task:
    """What is read, what is asked of it, how the answer begins, and its rest."""

    context: str
    question: str
    begins: str
    answer: str


@dataclass(frozen=True)
class Item:
    """A task in tokens.

    Attributes:
        name: its kind, length and number.
        prompt_ids: context, question and the beginning of the answer.
        context_tokens: how many of these are the context's.
        question_ids: the same prompt without the context.
        answer_ids: what is scored.
    """

    name: str
    prompt_ids: tuple[int, ...]
    context_tokens: int
    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.name.split()[0]


def items(tokenizer: Tokenizer, lengths: Sequence[int], each: int) -> list[Item]:
    """``each`` of every kind whose prompts take at most so many tokens, and nearly that.

    Raises InvalidRequestError where the least of a kind takes more.
    """
    return [
        _item(tokenizer, kind, tokens, number)
        for tokens in lengths
        for kind in KINDS
        for number in range(each)
    ]


def _item(tokenizer: Tokenizer, kind: str, tokens: int, number: int) -> Item:
    name = f"{kind} {tokens} {number}"

    def prompt(size: int, *, about: bool = True) -> tuple[Task, list[int]]:
        task = KINDS[kind](Random(name), size)
        asked = f"{task.context}\n\n{task.question}" if about else task.question
        return task, [*_user(tokenizer, asked), *tokenizer.encode_part(task.begins)]

    # A word or a line is a token at least.
    size = bisect_right(range(LEAST, tokens), tokens, key=lambda size: len(prompt(size)[1])) + LEAST - 1
    if size < LEAST:
        raise InvalidRequestError(
            f"--task-prompts has {tokens}; the least of {kind} takes {len(prompt(LEAST)[1])}: give more"
        )
    task, ids = prompt(size)
    context = _user(tokenizer, task.context)
    shared = sum(takewhile(bool, (a == b for a, b in zip(context, ids, strict=False))))
    _, question = prompt(size, about=False)
    answer = tokenizer.encode_part(task.answer)
    return Item(name, tuple(ids), shared, tuple(question), tuple(answer))


def _user(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.chat(Chat.of([ChatMessage("user", text)]))


def _magic(keys: int, values: int, asked: int, draw: Random, size: int) -> Task:
    """``keys`` keys with ``values`` numbers each among text, ``asked`` of them asked for."""
    # Keys alone fill a context of their own.
    held = _keys(draw, keys or size)
    numbers = [[str(draw.randrange(10**6, 10**7)) for _ in range(values)] for _ in held]
    told = [
        f"One of the special magic numbers for {key} is: {number}."
        for key, own in zip(held, numbers, strict=True)
        for number in own
    ]
    context = _planted(draw, size, told) if keys else "\n".join(told)
    picked = sorted(draw.sample(range(len(held)), asked))
    names = _listed([held[index] for index in picked])
    return Task(
        f"Some special magic numbers are hidden within the following text. Memorise them.\n{context}",
        f"What are all the special magic numbers for {names} mentioned in the text?",
        f"The special magic numbers for {names} mentioned in the text are",
        " " + _listed([number for index in picked for number in numbers[index]]),
    )


def _variables(draw: Random, size: int) -> Task:
    names = ["".join(draw.choices(string.ascii_uppercase, k=5)) for _ in range(HOPS + 1)]
    value = str(draw.randrange(10_000, 100_000))
    chain = [f"VAR {name} = {of}." for name, of in zip(names, (value, *names), strict=False)]
    return Task(
        f"Memorise and track the chain of variable assignment in the following text.\n"
        f"{_planted(draw, size, chain)}",
        f"Find all variables that are assigned the value {value} in the text.",
        f"According to the chain of variable assignment, {len(names)} variables are assigned the value "
        f"{value}, they are:",
        " " + _listed(names),
    )


def _common(draw: Random, size: int) -> Task:
    """Of about ``size`` words ten come equally often, and are two fifths of all; each other comes once."""
    times = max(2, size // 25)
    words = draw.sample(_vocabulary(), min(len(_vocabulary()), max(0, size - COMMON * times) + COMMON))
    common = words[:COMMON]
    listed = common * times + words[COMMON:]
    draw.shuffle(listed)
    return Task(
        "Below is a numbered list of words. Memorise the ones that appear most often.\n"
        + " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)),
        f"What are the {COMMON} most common words in the list?",
        f"The {COMMON} words that appear most often are:",
        " " + _listed(sorted(common, key=listed.index)),
    )


def _frequent(draw: Random, size: int) -> Task:
    """``size`` coded words, the k-th of which comes as often as k to the power of -RARER."""
    words = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(size)]
    coded: list[str] = []
    for rank, word in enumerate(words, 1):
        coded += [word] * max(1, round(0.6 * size * rank**-RARER))
        if len(coded) >= size:
            break
    draw.shuffle(coded)
    return Task(
        f"Read the following coded text and track the frequency of each coded word.\n{' '.join(coded)}",
        f"What are the {FREQUENT} most frequent words in the coded text?",
        f"The {FREQUENT} most frequent words are:",
        " " + _listed(words[:FREQUENT]),
    )


def _question(draw: Random, size: int) -> Task:
    drawn = (draw.sample(words, 3 * NEEDLES) for words in (NAMES, THINGS, PLACES))
    facts = [Fact(*each) for each in zip(*drawn, strict=True)]
    asked = draw.choice(facts)
    begins, answer = asked.answer
    context = _planted(draw, size, [each.sentence.strip() for each in facts])
    return Task(f"Answer from the following text.\n{context}", asked.question, begins, answer)


# By RULER's names.
KINDS: dict[str, Callable[[Random, int], Task]] = {
    "niah_single": partial(_magic, 1, 1, 1),
    "niah_multikey": partial(_magic, 0, 1, 1),
    "niah_multivalue": partial(_magic, 1, NEEDLES, 1),
    "niah_multiquery": partial(_magic, NEEDLES, 1, NEEDLES),
    "vt": _variables,
    "cwe": _common,
    "fwe": _frequent,
    "qa": _question,
}
# What each has at least: words to plant between, lines, or words of a list.
LEAST = 3 * NEEDLES


def _planted(draw: Random, size: int, sentences: Sequence[str]) -> str:
    """``size`` words of Python's reference, with sentences in their order all over them."""
    words = _reference()
    first = draw.randrange(len(words) // 2)  # whatever the size, so that more words are more tokens
    picked = list(words[first : first + size])
    places = sorted(draw.sample(range(size), len(sentences)))
    for place, sentence in zip(places, sentences, strict=True):
        picked[place] += f". {sentence}"
    return " ".join(picked)


def _keys(draw: Random, count: int) -> list[str]:
    known = list(product(ADJECTIVES, THINGS, PLACES))
    return ["-".join(parts).lower() for parts in draw.sample(known, count)]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


@cache
def _reference() -> list[str]:
    return "\n\n".join(topics[name] for name in sorted(topics)).split(" ")


@cache
def _vocabulary() -> list[str]:
    """Words of the reference, the most usual first."""
    words = (word.strip("*`.,:;()\"'") for text in topics.values() for word in text.split())
    plain = Counter(word for word in words if 4 <= len(word) <= 9 and word.isascii() and word.islower())
    return [word for word, _ in plain.most_common() if word.isalpha()]
