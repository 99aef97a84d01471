"""What is kept of contexts that tasks ask about, their questions known and unknown."""

from collections.abc import Sequence
from statistics import mean

from workers.bench.cell import Holding
from workers.bench.facts import Asking
from workers.bench.parts.part import FULL, Done, Read, Record
from workers.bench.tasks import Item

# Whether the prompt is compressed with its question, or the context alone.
SEEN, UNSEEN = "seen", "unseen"
SESSION = "task"


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
