"""What is kept of a document's facts that later turns ask for."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from pyramidserve.types import Compression
from workers.bench.cell import Holding
from workers.bench.facts import TALK_TOKENS, Asking, Fact, Talk
from workers.bench.parts.part import FULL, Done, Record

# The ids of a first question about a document and of the full cache's reply, and what is asked behind it.
Begun = tuple[list[int], list[int], tuple[Fact, ...]]
# The ids of a first question, those of all that comes behind it, and which of these are wanted.
Told = tuple[list[int], list[int], list[slice]]


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
