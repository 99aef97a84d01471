"""A pipeline as the scheduler would run it, from one change to the next."""

import heapq
from collections import deque
from dataclasses import dataclass, field

from cluster.admit.ledger import PipelineLedger
from cluster.simulation.timing import Timing
from cluster.simulation.turn import SimulatedTurn
from workers.policies.registry import plan
from workers.schedule.tuning import DEFAULT_TUNING

# Sequences grow, and rounds with them: so many seconds at most are taken to pass at one speed.
LONGEST = 1.0
# Of rounds and seconds, which are sums.
ROUNDING = 1e-9


@dataclass(eq=False)
class _Sequence:
    """``left``: seconds of its prefill; ``joined``: the round at which ``done`` output tokens were fed."""

    number: int
    turn: SimulatedTurn
    first_pages: int
    slope: float
    left: float
    joined: float = 0.0
    done: float = 0.0

    @property
    def end(self) -> float:
        """The round with which it ends."""
        return self.joined + self.turn.answer_tokens - 1 - self.done

    def pages(self, done: float) -> float:
        return self.first_pages + self.slope * done


@dataclass(order=True)
class _Ending:
    round: float
    number: int
    sequence: _Sequence = field(compare=False)


class SimulatedPipeline:
    """Prefills in order, decode rounds, and what they take of each other's time and of the memory.

    Prompts that come before the first of them has its output begin to decode together. Moving sequences
    to the host and back is taken to cost nothing, and pages are those of all stages together.

    Attributes:
        ledger: the router's books.
        page_seconds: pages in use, over the time so far.
        leaving: it gets nothing new.
    """

    def __init__(
        self, ledger: PipelineLedger, timing: Timing, layers: int, page_bytes: int, began: float
    ) -> None:
        """A pipeline that is there from the second ``began`` on."""
        self.ledger = ledger
        self.leaving = False
        self.page_seconds = 0.0
        self._timing, self._layers, self._page_bytes = timing, layers, page_bytes
        self._stages = len(ledger.free)
        self._total = sum(ledger.pages[: self._stages])
        self._ended: list[tuple[int, SimulatedTurn]] = []
        self._began = self._now = began
        self._rounds = 0.0
        self._pages = self._slope = 0.0
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: _Sequence | None = None
        self._cohort, self._closed = 0, True
        self._resting: list[_Sequence] = []
        self._decoding: list[_Ending] = []
        self._suspended: deque[_Sequence] = deque()

    def capacity(self, now: float) -> float:
        """Pages that there are, over the time until ``now``."""
        return self._total * (now - self._began)

    @property
    def idle(self) -> bool:
        """Whether nothing runs."""
        return not len(self.ledger)

    def start(self, number: int, turn: SimulatedTurn) -> None:
        """Queues the prefill of a turn, now."""
        request = turn.request
        more = self.ledger.growth(request, request.max_tokens)
        first, most = (sum(pages[: self._stages]) for pages in (more.first, more.most))
        seconds = self._timing.prefill(plan(request.compression, len(request.prompt_ids), self._layers))
        slope = (most - first) / max(1, more.most_tokens)
        self._waiting.append(_Sequence(number, turn, first, slope, seconds))

    def step(self, now: float, busy: bool) -> list[tuple[int, SimulatedTurn]]:
        """Goes on until ``now``; returns the numbers and turns of what has ended.

        ``busy``: requests wait in the router's queue.
        """
        self._advance(now, busy)
        self._make_room()
        self._go_on()
        ended, self._ended = self._ended, []
        return ended

    def until_change(self, busy: bool) -> float | None:
        """Seconds until something changes by itself; None if nothing does."""
        rate, share = self._rates(busy)
        changes = []
        if self._prefilling:
            changes.append(self._prefilling.left / share)
        if self._decoding:
            changes += [(self._decoding[0].round - self._rounds) / rate, LONGEST]
            if self._crowded:
                changes.append((self._total - self._pages) / self._slope / rate)
        return max(0.0, min(changes)) if changes else None

    def tell_ledger(self) -> None:
        """Tells the ledger how far the sequences have come."""
        for ending in self._decoding:
            self.ledger.advance(ending.number, int(self._done(ending.sequence)))

    def _done(self, sequence: _Sequence) -> float:
        return sequence.done + self._rounds - sequence.joined

    def _rates(self, busy: bool) -> tuple[float, float]:
        """Rounds a second, and the share of time that prefills have."""
        share = 1.0 if self._prefilling else 0.0
        if not self._decoding:
            return 0.0, share
        seconds = self._timing.decode_round(len(self._decoding), self._pages * self._page_bytes)
        if self._prefilling:
            steps = DEFAULT_TUNING.busy_slice if busy or self._waiting else DEFAULT_TUNING.quiet_slice
            share = steps / (1 + steps)
        return (1 - share) / seconds, share

    def _advance(self, now: float, busy: bool) -> None:
        seconds = now - self._now
        self._now = now
        rate, share = self._rates(busy)
        grown = self._slope * rate * seconds
        self.page_seconds += (self._pages + grown / 2) * seconds
        self._pages += grown
        self._rounds += rate * seconds
        if self._prefilling:
            self._prefilling.left -= share * seconds
            if self._prefilling.left <= ROUNDING:
                self._prefilled(self._prefilling)
        while self._decoding and self._decoding[0].round <= self._rounds + ROUNDING:
            sequence = heapq.heappop(self._decoding).sequence
            self._slope -= sequence.slope
            self._end(sequence, sequence.turn.answer_tokens - 1)

    def _prefilled(self, sequence: _Sequence) -> None:
        self._prefilling = None
        sequence.turn.first_token = self._now
        if sequence.turn.answer_tokens == 1:
            self._end(sequence, 0)
        else:
            self._resting.append(sequence)
        self._cohort = self._cohort - 1 if self._closed else len(self._waiting)
        self._closed = True
        if not self._cohort:
            for each in self._resting:
                self._join(each)
            self._resting.clear()

    def _join(self, sequence: _Sequence) -> None:
        sequence.joined = self._rounds
        self._slope += sequence.slope
        heapq.heappush(self._decoding, _Ending(sequence.end, sequence.number, sequence))

    def _end(self, sequence: _Sequence, done: float) -> None:
        self._pages -= sequence.pages(done)
        sequence.turn.ended = self._now
        self._ended.append((sequence.number, sequence.turn))

    @property
    def _crowded(self) -> bool:
        """Whether sequences grow until the pool is full, and there are others that could make room."""
        return self._slope > ROUNDING and len(self._decoding) > 1

    def _make_room(self) -> None:
        """Suspends the youngest as long as there are more pages in use than there may be."""
        while self._crowded and self._pages > self._total * (1 - ROUNDING):
            youngest = max(self._decoding, key=lambda each: each.number)
            self._decoding.remove(youngest)
            heapq.heapify(self._decoding)
            sequence = youngest.sequence
            sequence.done = self._done(sequence)
            sequence.turn.preemptions += 1
            self._pages -= sequence.pages(sequence.done)
            self._slope -= sequence.slope
            self._suspended.append(sequence)

    def _go_on(self) -> None:
        """Brings suspended sequences back; if there are none, begins the next prefill."""
        while self._suspended:
            oldest = min(self._suspended, key=lambda each: each.number)
            # With room for a round of all, or the next step would suspend it again.
            if self._pages + self._slope + oldest.pages(oldest.done + 1) > self._total:
                return
            self._suspended.remove(oldest)
            self._pages += oldest.pages(oldest.done)
            self._join(oldest)
        if self._prefilling or not self._waiting:
            return
        if self._pages + self._waiting[0].first_pages > self._total:
            self._wake_cohort()
            return
        if not self._cohort:
            self._cohort, self._closed = len(self._waiting), False
        self._prefilling = self._waiting.popleft()
        self._pages += self._prefilling.first_pages

    def _wake_cohort(self) -> None:
        """Lets those decode that rest, as only their end makes room for the others."""
        for each in self._resting:
            self._join(each)
        self._resting.clear()
        self._cohort = 0
