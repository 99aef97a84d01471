"""How likely real text is behind compressed prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from pyramidserve.errors import InvalidRequestError
from workers.bench.cell import Holding
from workers.bench.facts import Asking
from workers.bench.parts.part import AT_ONCE, Done, Read, Record
from workers.bench.problems import Problem
from workers.bench.texts import windows
from workers.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passage:
    """A prompt, and what is read behind it."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


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
