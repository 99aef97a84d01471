"""What is kept of a document's facts that later turns ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from workers.bench.cell import Holding
from workers.bench.facts import TALK_TOKENS, Asking, Talk, Turn
from workers.bench.parts.part import FULL, Done, Record


@dataclass(frozen=True)
class BegunTalk:
    """The ids of a first question about a document and of the full cache's reply, and the turns to come."""

    prompt_ids: list[int]
    reply_ids: list[int]
    turns: list[Turn]

    def at_once(self) -> tuple[list[int], list[int], list[slice]]:
        """For one reading behind the prompt: the ids that are given, those from the first wanted one on,
        and where among these what is wanted lies."""
        behind, wanted = list(self.reply_ids), []
        for turn in self.turns:
            behind += [*turn.question_ids, *turn.reply_ids]
            wanted.append((len(behind) - len(turn.reply_ids) + turn.given, len(behind)))
        first = wanted[0][0]
        return behind[:first], behind[first:], [slice(start - first, end - first) for start, end in wanted]


class Facts:
    """What is kept of a document's facts that are asked for in later turns."""

    def __init__(self, held: Sequence[Talk], tokens: int) -> None:
        """Talks about documents of ``tokens`` tokens."""
        self._held = held
        self._without: list[float] = []
        self.begun: list[BegunTalk] = []
        self.prompt_tokens = len(held) * tokens
        self.longest = tokens + TALK_TOKENS

    def begin(self, asking: Asking) -> None:
        """The full cache's first replies, and how likely the answers are without the documents."""
        self.begun = [
            BegunTalk(*asking.begin(talk.document), asking.turns(talk.asked)) for talk in self._held
        ]
        bare, reply = asking.begin("")
        for talk in self.begun:
            answers = asking.ask(bare, reply, talk.turns, FULL)
            self._without += [each["log_probability"] for each in answers]

    def measure(self, asking: Asking, holding: Holding, full: Record | None, done: Done) -> Record:
        answers = []
        for talk in self.begun:
            compression = holding.asks(len(talk.prompt_ids))
            answers += asking.ask(talk.prompt_ids, talk.reply_ids, talk.turns, compression)
            done(self.prompt_tokens // len(self.begun))
        found = [each["log_probability"] for each in answers]
        return self.record(found, mean(each["device_share"] for each in answers)) | {
            "fixed": mean(holding.fixed(len(talk.prompt_ids)) for talk in self.begun),
        }

    def record(self, found: Sequence[float], kept: float) -> Record:
        """Of each question the nats by which its document makes the answer likelier."""
        pairs = zip(found, self._without, strict=True)
        return {"kept": kept, "gains": [round(own - without, 4) for own, without in pairs]}
