"""A pipeline as the scheduler would run it, from one change to the next."""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cluster.admit.ledger import PipelineLedger
from cluster.simulation.prefills import SimulatedPrefills
from cluster.simulation.sequence import SimulatedSequence
from cluster.simulation.timing import Timing
from cluster.simulation.turn import SimulatedTurn
from workers.budget.forecast import Forecast
from workers.policies.registry import plan
from workers.schedule.cohorts import Cohorts

# Sequences grow, and rounds with them: so many seconds at most are taken to pass at one speed.
LONGEST = 1.0
# Of rounds and seconds, which are sums.
ROUNDING = 1e-9


@dataclass(order=True)
class _Ending:
    round: float
    number: int
    sequence: SimulatedSequence = field(compare=False)


class SimulatedPipeline:
    """Prefills in order, decode rounds, and what they take of each other's time and of the memory.

    Who begins to decode together, the scheduler's own cohorts say; who comes back, its forecast. Moving
    sequences to the host and back is taken to cost nothing, and the host to have room for all.

    Attributes:
        ledger: the router's books.
        page_seconds: pages in use, over the time so far.
        leaving: it gets nothing new.
    """

    def __init__(
        self,
        ledger: PipelineLedger,
        timing: Timing,
        layers: int,
        page_bytes: int,
        max_prefill_tokens: int,
        began: float,
    ) -> None:
        """A pipeline that is there from the second ``began`` on."""
        self.ledger = ledger
        self.leaving = False
        self.page_seconds = 0.0
        self._timing, self._layers, self._page_bytes = timing, layers, page_bytes
        self._stages = len(ledger.free)
        self._total = sum(ledger.pages[: self._stages])
        self._forecast = Forecast(ledger.pages[: self._stages], ledger.max_sequences)
        self._ended: list[tuple[int, SimulatedTurn]] = []
        self._began = self._now = began
        self._rounds = 0.0
        # Pages of those that decode, which grow by the slope a round, and of the others.
        self._growing = self._slope = self._still = 0.0
        self._cohorts = Cohorts()
        self._prefills = SimulatedPrefills(timing, self._stages, max_prefill_tokens, self._cohorts)
        self._resting: dict[int, SimulatedSequence] = {}
        self._rest_round = math.inf
        self._decoding: list[_Ending] = []
        self._suspended: list[SimulatedSequence] = []

    def capacity(self, now: float) -> float:
        """Pages that there are, over the time until ``now``."""
        return self._total * (now - self._began)

    @property
    def idle(self) -> bool:
        """Whether nothing runs."""
        return not len(self.ledger)

    def start(self, number: int, turn: SimulatedTurn, expected_tokens: int) -> None:
        """Queues the prefill of a turn, now."""
        request = turn.request
        more = self.ledger.growth(request, expected_tokens)
        first, expected, most = (pages[: self._stages] for pages in (more.first, more.expected, more.most))
        growth = replace(more, first=first, expected=expected, most=most)
        keep = plan(request.compression, len(request.prompt_ids), self._layers)
        self._forecast.add(number, growth)
        self._prefills.waiting.append(SimulatedSequence(number, turn, keep, growth))

    def step(self, now: float, busy: bool) -> list[tuple[int, SimulatedTurn]]:
        """Goes on until ``now``; returns the numbers and turns of what has ended.

        ``busy``: requests wait in the router's queue.
        """
        self._advance(now)
        self._make_room()
        if not self._suspended or self._resume():
            self._begin_prefills(busy)
        else:
            self._wake_resting()
        ended, self._ended = self._ended, []
        return ended

    def until_change(self) -> float | None:
        """Seconds until something changes by itself; None if nothing does."""
        rate, share = self._rates()
        changes = []
        if self._prefills:
            changes.append(self._prefills.until_change() / share)
        if self._decoding:
            changes += [(self._decoding[0].round - self._rounds) / rate, LONGEST]
            changes.append((self._rest_round - self._rounds) / rate)
            if self._crowded:
                changes.append((self._total - self._pages) / self._slope / rate)
        return max(0.0, min(changes)) if changes else None

    def tell_ledger(self) -> None:
        """Tells the ledger how far the sequences have come."""
        for ending in self._decoding:
            self.ledger.advance(ending.number, int(self._done(ending.sequence)))

    @property
    def _pages(self) -> float:
        return self._growing + self._still

    def _done(self, sequence: SimulatedSequence) -> float:
        return sequence.done + self._rounds - sequence.joined

    def _rates(self) -> tuple[float, float]:
        """Rounds a second, and the share of a shard's time that prefills have."""
        share = 1.0 if self._prefills else 0.0
        if not self._decoding:
            return 0.0, share
        seconds = self._timing.decode_round(len(self._decoding), self._growing * self._page_bytes)
        if self._prefills:
            share = self._prefills.slice / (1 + self._prefills.slice)
        return (1 - share) / seconds, share

    def _advance(self, now: float) -> None:
        seconds = now - self._now
        self._now = now
        rate, share = self._rates()
        grown = self._slope * rate * seconds
        self.page_seconds += (self._pages + grown / 2) * seconds
        self._growing += grown
        self._rounds += rate * seconds
        while self._decoding and self._decoding[0].round <= self._rounds + ROUNDING:
            self._end(self._leave(self._decoding[0]))
        if self._rest_round <= self._rounds + ROUNDING:
            self._rest()
        for sequences in self._prefills.advance(share * seconds):
            self._prefilled(sequences)

    def _prefilled(self, sequences: list[SimulatedSequence]) -> None:
        """They have their first output; those of their cohort that have some decode once, or on and on."""
        for sequence in sequences:
            sequence.turn.first_token = self._now
            self._resting[sequence.number] = sequence
        going_on = [each.number for each in sequences if each.turn.answer_tokens > 1]
        awake = self._cohorts.prefilled([each.number for each in sequences], going_on)
        for sequence in sequences:
            if sequence.turn.answer_tokens == 1:
                self._end(self._resting.pop(sequence.number))
        self._join(awake)
        self._rest_round = self._rounds + 1
        if self._cohorts.closing:
            self._prefills.form_cohort()
            self._cohorts.close()

    def _join(self, awake: Iterable[int]) -> None:
        """Lets those decode that have rested."""
        for number in awake:
            self._decode(self._resting.pop(number))

    def _decode(self, sequence: SimulatedSequence) -> None:
        sequence.joined = self._rounds
        self._still -= sequence.pages
        self._growing += sequence.pages
        self._slope += sequence.slope
        heapq.heappush(self._decoding, _Ending(sequence.end, sequence.number, sequence))

    def _leave(self, ending: _Ending) -> SimulatedSequence:
        """Takes one out that decodes."""
        self._decoding.remove(ending)
        heapq.heapify(self._decoding)
        sequence = ending.sequence
        sequence.done = self._done(sequence)
        self._slope -= sequence.slope
        self._growing -= sequence.pages
        self._still += sequence.pages
        return sequence

    def _rest(self) -> None:
        """Lets those rest that have decoded once, while others of their cohort have no output."""
        self._rest_round = math.inf
        for ending in list(self._decoding):
            if self._cohorts.rest(ending.number):
                self._resting[ending.number] = self._leave(ending)

    def _end(self, sequence: SimulatedSequence) -> None:
        self._still -= sequence.pages
        self._forecast.remove(sequence.number)
        self._join(self._cohorts.remove(sequence.number))
        sequence.turn.ended = self._now
        self._ended.append((sequence.number, sequence.turn))

    @property
    def _crowded(self) -> bool:
        """Whether sequences grow until the pool is full, and there are others that could make room."""
        return self._slope > ROUNDING and len(self._decoding) + len(self._resting) > 1

    def _make_room(self) -> None:
        """Suspends the youngest as long as there are more pages in use than there may be."""
        while self._crowded and self._pages > self._total * (1 - ROUNDING):
            youngest = max(self._decoding, key=lambda each: each.number)
            resting = max(self._resting, default=-1)
            rests = resting > youngest.number
            sequence = self._resting.pop(resting) if rests else self._leave(youngest)
            sequence.turn.preemptions += 1
            self._still -= sequence.pages
            self._forecast.remove(sequence.number)
            self._suspended.append(sequence)
            self._join(self._cohorts.remove(sequence.number))

    def _resume(self) -> bool:
        """Brings suspended sequences back that find room until their end; returns whether all are."""
        for ending in self._decoding:
            self._forecast.advance(ending.number, int(self._done(ending.sequence)))
        for oldest in sorted(self._suspended, key=lambda each: each.number):
            fits = self._pages + oldest.pages <= self._total
            done = int(oldest.done)
            if self._pages > ROUNDING and not (fits and self._forecast.fits(oldest.growth, done)):
                return False
            self._suspended.remove(oldest)
            self._forecast.add(oldest.number, oldest.growth, done)
            self._still += oldest.pages
            self._decode(oldest)
        return True

    def _begin_prefills(self, busy: bool) -> None:
        """Begins as many as may."""
        while self._prefills.may_begin:
            begun = self._prefills.begin(self._total - self._pages, busy)
            self._still += sum(each.first_pages for each in begun)
            if not begun:
                self._wake_resting()
                return

    def _wake_resting(self) -> None:
        """Lets those decode that rest for prefills without room: only their end makes some."""
        for each in self._prefills.waiting:
            self._join(self._cohorts.remove(each.number))
