"""The prefills of a simulated pipeline: who waits for one, and which are on their way. Pure."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.simulation.sequence import SimulatedSequence
from cluster.simulation.timing import Timing
from workers.schedule.cohorts import Cohorts
from workers.schedule.tuning import ScheduleTuning

TUNING = ScheduleTuning()

# Of seconds, which are sums.
ROUNDING = 1e-9


@dataclass
class _Prefill:
    """A micro-batch on its way.

    Attributes:
        left: seconds of shards until it has passed all of them.
        first_left: those until it has passed the first, so that the next may begin.
    """

    sequences: list[SimulatedSequence]
    left: float
    first_left: float


class SimulatedPrefills:
    """Prompts in order, as many micro-batches of them on their way as there are shards.

    Attributes:
        waiting: those that have no prefill yet.
        slice: decode rounds for which the newest holds up those that decode.
    """

    def __init__(self, timing: Timing, shards: int, max_prefill_tokens: int, cohorts: Cohorts) -> None:
        """``cohorts`` learn of those that wait."""
        self.waiting: deque[SimulatedSequence] = deque()
        self.slice = 0.0
        self._timing, self._shards = timing, shards
        self._max_tokens, self._cohorts = max_prefill_tokens, cohorts
        # Tokens of prompts that the open cohort has room for.
        self._cohort_room = 0
        self._under_way: deque[_Prefill] = deque()

    def __len__(self) -> int:
        """How many are on their way."""
        return len(self._under_way)

    @property
    def may_begin(self) -> bool:
        """Whether somebody waits and the first shard is free."""
        if not self.waiting or len(self._under_way) == self._shards:
            return False
        return not self._under_way or self._under_way[-1].first_left <= ROUNDING

    def until_change(self) -> float:
        """Seconds of shards until one ends, or the first shard is free for the next."""
        first_left = self._under_way[-1].first_left
        if self.waiting and first_left > ROUNDING:
            return min(self._under_way[0].left, first_left)
        return self._under_way[0].left

    def begin(self, room: float, busy: bool) -> list[SimulatedSequence]:
        """Begins a prefill for those of the queue that share it; none if there is no ``room`` for pages.

        ``busy``: others wait in the router's queue.
        """
        if self.waiting[0].number not in self._cohorts:
            self.form_cohort()
        if self.waiting[0].number not in self._cohorts:  # the open one is full
            self._cohorts.close()
            self.form_cohort()
        first, tokens = self.waiting[0].number, 0
        sequences: list[SimulatedSequence] = []
        while self.waiting and self._cohorts.same(first, self.waiting[0].number):
            tokens += self.waiting[0].plan.prompt_tokens
            room -= self.waiting[0].first_pages
            if room < 0 or (sequences and tokens > self._max_tokens // self._shards):
                break
            sequences.append(self.waiting.popleft())
        if sequences:
            seconds = self._timing.prefill([each.plan for each in sequences])
            ahead = self._under_way[-1].left if self._under_way else 0.0
            left = max(self._shards * seconds, ahead + seconds)
            self._under_way.append(_Prefill(sequences, left, seconds))
            others_wait = busy or self.waiting
            self.slice = TUNING.busy_slice if others_wait else TUNING.quiet_slice
        return sequences

    def advance(self, seconds: float) -> Iterator[list[SimulatedSequence]]:
        """Goes on for ``seconds`` of each shard; the sequences of each prefill that ends."""
        for prefill in self._under_way:
            prefill.left -= seconds
            prefill.first_left -= seconds
        while self._under_way and self._under_way[0].left <= ROUNDING:
            yield self._under_way.popleft().sequences

    def form_cohort(self) -> None:
        """Lets those that wait join the open cohort, or makes them one, as far as it has room."""
        if not self._cohorts.open:
            self._cohort_room = TUNING.cohort_prefills * self._max_tokens
        joining: list[int] = []
        for each in self.waiting:
            if each.number in self._cohorts:
                continue
            if each.plan.prompt_tokens > self._cohort_room and (joining or self._cohorts.open):
                break
            self._cohort_room -= each.plan.prompt_tokens
            joining.append(each.number)
        self._cohorts.form(joining)
