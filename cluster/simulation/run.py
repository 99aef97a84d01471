"""Chat traffic on simulated pipelines, admitted and placed by the router's own code."""

import gc
import itertools
import time
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import simpy

from cluster.admit.admission import Admission
from cluster.admit.ledger import PipelineLedger
from cluster.admit.placement import Placement
from cluster.admit.sessions import Sessions
from cluster.autoscale import pipelines_for
from cluster.load.trace import MOST_ANSWER, Session
from cluster.simulation.pipeline import SimulatedPipeline
from cluster.simulation.setup import Scaling, Setup
from cluster.simulation.timing import Timing
from cluster.simulation.turn import SimulatedTurn, simulated_turn
from pyramidserve.errors import OverloadedError
from workers.policies.settled import settled

SESSION_LIMIT, SESSION_MAX_AGE = 10**6, 3600.0
SAMPLE_INTERVAL = 1.0

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Sample:
    """The cluster at a moment; ``page_seconds`` and ``capacity`` since the beginning."""

    moment: float
    queued: int
    running: int
    pipelines: int
    page_seconds: float
    capacity: float


class Turns:
    """What has become of turns, in columns: as objects, a million of them would keep the collector busy.

    Attributes:
        arrived, began, first_token, ended: seconds, NaN where that has not happened.
        answer_tokens, preemptions: as in SimulatedTurn.
        refused: 1 or 0.
    """

    def __init__(self) -> None:
        self.arrived, self.began, self.first_token, self.ended = (array("d") for _ in range(4))
        self.answer_tokens, self.preemptions, self.refused = (array("q") for _ in range(3))

    def add(self, turn: SimulatedTurn) -> None:
        """Writes down what ``turn`` has come to."""
        for moments, moment in (
            (self.arrived, turn.arrived),
            (self.began, turn.began),
            (self.first_token, turn.first_token),
            (self.ended, turn.ended),
        ):
            moments.append(moment)
        self.answer_tokens.append(turn.answer_tokens)
        self.preemptions.append(turn.preemptions)
        self.refused.append(turn.refused)


@dataclass
class Simulated:
    """What has happened in ``seconds``; ``router_seconds`` are real ones, of this machine."""

    seconds: float = 0.0
    turns: Turns = field(default_factory=Turns)
    samples: list[Sample] = field(default_factory=list)
    decisions: int = 0
    router_seconds: float = 0.0


class Simulation:
    """A cluster in simulated time."""

    def __init__(self, setup: Setup) -> None:
        self.result = Simulated()
        self._setup = setup
        self._env = simpy.Environment()
        self._timing = Timing(setup.model, setup.itemsize, setup.shards, setup.limits, setup.costs)
        self._stages = setup.stages()
        self._admission: Admission[SimulatedTurn] = Admission(setup.queue_limit, {}, self._clock)
        self._sessions = Sessions(SESSION_LIMIT, SESSION_MAX_AGE, self._clock)
        self._placement = Placement()
        self._pipelines: dict[str, SimulatedPipeline] = {}
        self._names = (f"p{number}" for number in itertools.count())
        self._wakes: dict[str, simpy.Event] = {}
        self._ends: dict[SimulatedTurn, simpy.Event] = {}
        self._starting = 0
        # Of pipelines that have left.
        self._past = (0.0, 0.0)
        for _ in range(setup.pipelines):
            self._attach()

    def run_chat(self, plan: Iterable[tuple[float, Session]], seconds: float) -> Simulated:
        """Lets sessions begin at their moments and ends all that is under way after ``seconds``."""
        self._env.process(self._arrivals(plan))
        self._env.process(self._watch())
        if self._setup.scaling:
            self._env.process(self._scale(self._setup.scaling))
        self._env.run(seconds)
        return self._finish()

    def run_batch(self, turns: Sequence[SimulatedTurn]) -> Simulated:
        """Lets ``turns`` come at once, and ends with the last of them."""
        ends = [self._submit(turn) for turn in turns]
        self._env.run(self._env.all_of(ends))
        return self._finish()

    def _finish(self) -> Simulated:
        for turn in self._ends:
            self.result.turns.add(turn)
        self.result.seconds = self._env.now
        self.result.decisions = sum(
            count for what, count in self._admission.decisions.items() if what != "finished"
        )
        return self.result

    def _clock(self) -> float:
        return float(self._env.now)

    def _arrivals(self, plan: Iterable[tuple[float, Session]]) -> Process:
        for number, (moment, session) in enumerate(plan):
            yield self._env.timeout(moment - self._clock())
            self._env.process(self._talk(f"s{number}", session))

    def _talk(self, name: str, session: Session) -> Process:
        asked, model, kv_dtype = self._setup.compression, self._setup.model, self._setup.kv_format.name
        for index, spoken in enumerate(session.turns):
            tokens = session.prompt_tokens(index), spoken.answer_tokens, MOST_ANSWER
            compression = settled(asked, model, kv_dtype, max(1, tokens[0]))
            turn = simulated_turn(*tokens, compression, name, self._clock())
            yield self._submit(turn)
            if turn.refused:
                return
            yield self._env.timeout(spoken.thinking)

    def _submit(self, turn: SimulatedTurn) -> simpy.Event:
        """Sends a turn to the router; the event comes with its end."""
        self._ends[turn] = end = self._env.event()
        with self._routing():
            try:
                self._admission.enqueue(turn, self._placement)
            except OverloadedError:
                turn.refused = True
        if turn.refused:
            self._leave(turn)
        self._dispatch()
        return end

    def _leave(self, turn: SimulatedTurn) -> None:
        self.result.turns.add(turn)
        self._ends.pop(turn).succeed()

    def _dispatch(self) -> None:
        with self._routing():
            chosen = self._admission.choose(self._placement, self._sessions)
            for admitted in chosen:
                if session_id := admitted.item.request.session_id:
                    self._sessions.place(session_id, admitted.pipeline_id)
        for admitted in chosen:
            admitted.item.began = self._clock()
            self._pipelines[admitted.pipeline_id].start(
                admitted.sequence_id, admitted.item, admitted.expected_tokens
            )
            self._wake(admitted.pipeline_id)

    @contextmanager
    def _routing(self) -> Iterator[None]:
        """Takes the time of what the router does; the collector, which goes through all users, waits."""
        gc.disable()
        began = time.perf_counter()
        yield
        self.result.router_seconds += time.perf_counter() - began
        gc.enable()

    def _wake(self, pipeline_id: str) -> None:
        if not self._wakes[pipeline_id].triggered:
            self._wakes[pipeline_id].succeed()

    def _attach(self) -> None:
        ledger = PipelineLedger(next(self._names), self._stages, self._setup.max_sequences)
        pipeline = SimulatedPipeline(
            ledger,
            self._timing,
            self._setup.model.layers,
            self._setup.page_bytes,
            self._setup.max_prefill_tokens,
            self._clock(),
        )
        self._pipelines[ledger.pipeline_id] = pipeline
        self._wakes[ledger.pipeline_id] = self._env.event()
        self._placement.gained(ledger)
        self._env.process(self._serve(pipeline))

    def _serve(self, pipeline: SimulatedPipeline) -> Process:
        name = pipeline.ledger.pipeline_id
        while True:
            while ended := pipeline.step(self._clock(), self._busy):
                self._end(pipeline, ended)
            if pipeline.leaving and pipeline.idle:
                break
            wait = pipeline.until_change()
            self._wakes[name] = wake = self._env.event()
            yield wake if wait is None else wake | self._env.timeout(wait)
        self._past = self._past[0] + pipeline.page_seconds, self._past[1] + pipeline.capacity(self._clock())
        del self._pipelines[name], self._wakes[name]

    @property
    def _busy(self) -> bool:
        return len(self._admission) > 0

    def _end(self, pipeline: SimulatedPipeline, ended: Sequence[tuple[int, SimulatedTurn]]) -> None:
        pipeline.tell_ledger()
        with self._routing():
            for number, turn in ended:
                pipeline.ledger.remove(number)
                self._admission.count_finished(turn.request, turn.answer_tokens, turn.inter_token)
                self._sessions.count_turn(turn.request.session_id, None)
            if not pipeline.leaving:
                self._placement.gained(pipeline.ledger)
        for _, turn in ended:
            self._leave(turn)
        self._dispatch()

    def _watch(self) -> Process:
        while True:
            there = list(self._pipelines.values())
            self.result.samples.append(
                Sample(
                    self._clock(),
                    len(self._admission),
                    sum(len(each.ledger) for each in there),
                    len(there),
                    self._past[0] + sum(each.page_seconds for each in there),
                    self._past[1] + sum(each.capacity(self._clock()) for each in there),
                )
            )
            yield self._env.timeout(SAMPLE_INTERVAL)

    def _scale(self, scaling: Scaling) -> Process:
        """Follows the demand as Serve does, after it has been asking for the same for long enough."""
        more_since = fewer_since = 0.0
        while True:
            yield self._env.timeout(SAMPLE_INTERVAL)
            staying = [each for each in self._pipelines.values() if not each.leaving]
            demand = self._admission.demand([each.ledger for each in staying])
            wanted = pipelines_for(demand, scaling.target_pressure)
            wanted = min(max(wanted, self._setup.pipelines), scaling.most)
            there, now = len(staying) + self._starting, self._clock()
            more_since = more_since if wanted > there else now
            fewer_since = fewer_since if wanted < there else now
            if now - more_since >= scaling.up_seconds:
                for _ in range(wanted - there):
                    self._starting += 1
                    self._env.process(self._start(scaling.start_seconds))
            if now - fewer_since >= scaling.down_seconds:
                staying.sort(key=lambda each: len(each.ledger))
                for pipeline in staying[: there - wanted]:
                    pipeline.leaving = True
                    self._placement.close(pipeline.ledger.pipeline_id)
                    self._wake(pipeline.ledger.pipeline_id)

    def _start(self, seconds: float) -> Process:
        yield self._env.timeout(seconds)
        self._starting -= 1
        self._attach()
        self._dispatch()
