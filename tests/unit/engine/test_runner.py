"""The engine in its thread: orders go in from outside, every step is reported."""

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from fake_pipeline import FakePipeline, Spoken, layout, request

from workers.budget.pages import IntegrityError
from workers.engine import runner as runner_module
from workers.engine.loop import EngineLoop, SequenceCancelled, SequenceFinished, SequenceTokens
from workers.engine.pipeline import Outcome
from workers.engine.runner import Cancel, EngineRunner, Report, SequenceRefused, Start
from workers.schedule.tuning import ScheduleTuning

PATIENCE = 60  # seconds that anything may take before the test fails


class GatedPipeline(FakePipeline):
    """Brings a step back only when the test lets it, or fails as the test says."""

    def __init__(self) -> None:
        super().__init__(lambda sequence, index: 65)
        self.gate: SimpleQueue[Exception | None] = SimpleQueue()
        self.reached: SimpleQueue[None] = SimpleQueue()

    def collect(self) -> Outcome:
        self.reached.put(None)
        if error := self.gate.get(timeout=PATIENCE):
            raise error
        return super().collect()


@dataclass
class Running:
    """A runner, and what it said."""

    max_sequences: int = 8
    tuning: ScheduleTuning = ScheduleTuning()
    pipeline: GatedPipeline = field(default_factory=GatedPipeline)
    reports: SimpleQueue[Report] = field(default_factory=SimpleQueue)
    failures: SimpleQueue[tuple[BaseException, str]] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.loop = EngineLoop(
            layout(max_sequences=self.max_sequences, tuning=self.tuning), self.pipeline, Spoken(), ()
        )
        self.runner = EngineRunner(self.loop, self.reports.put, self.fail)
        self.runner.start()

    def fail(self, error: BaseException) -> None:
        self.failures.put((error, threading.current_thread().name))

    def begin(self, *sequences: int, max_tokens: int = 3) -> int:
        """Orders sequences and waits until their first step is under way."""
        orders = self.runner.order(Start(tuple(request(key, 3, max_tokens) for key in sequences)))
        self.pipeline.reached.get(timeout=PATIENCE)
        return orders

    def report(self) -> Report:
        return self.reports.get(timeout=PATIENCE)

    def rest(self) -> list[Report]:
        """Lets steps through until nothing is left."""
        reports: list[Report] = []
        while not reports or not reports[-1].idle:
            self.pipeline.gate.put(None)
            reports.append(self.report())
        return reports


def test_a_started_sequence_is_reported_step_by_step_to_its_end() -> None:
    running = Running()
    assert running.begin(1) == 1
    reports = running.rest()
    *tokens, last = reports
    assert [type(event) for report in tokens for event in report.events] == [SequenceTokens] * 3
    assert [type(event) for event in last.events] == [SequenceFinished]
    assert [report.idle for report in reports] == [False] * 3 + [True]
    assert [report.orders for report in reports] == [1] * 4
    assert [report.memory[0].pages_in_use for report in reports] == [1, 2, 3, 4]


def test_orders_are_taken_between_steps_and_counted() -> None:
    running = Running()
    running.begin(1)
    assert running.runner.order(Start((request(2),))) == 2
    assert running.runner.order(Cancel((7,))) == 3
    running.pipeline.gate.put(None)
    assert running.report().orders == 1
    later = running.rest()
    assert {report.orders for report in later} == {3}
    finished = [event for report in later for event in report.events if isinstance(event, SequenceFinished)]
    assert sorted(event.sequence for event in finished) == [1, 2]


@pytest.mark.parametrize("sequences", [None, (1, 2, 3)])
def test_cancelling_ends_all_that_is_named_or_all(sequences: tuple[int, ...] | None) -> None:
    running = Running()
    running.begin(1, 2, max_tokens=50)
    running.runner.order(Start((request(3),)))
    running.runner.order(Cancel(sequences))
    running.pipeline.gate.put(None)
    assert len(running.report().events) == 2
    events = [event for report in running.rest() for event in report.events]
    assert set(events) == {SequenceCancelled(1), SequenceCancelled(2), SequenceCancelled(3)}
    assert len(events) == 3


def test_prefills_hurry_while_others_wait_outside() -> None:
    slices = []
    for queued in (0, 5):
        running = Running(tuning=ScheduleTuning(quiet_slice=0.7, busy_slice=7.0))
        running.runner.order(Start((request(1),), queued))
        running.pipeline.reached.get(timeout=PATIENCE)
        slices.append(running.pipeline.submitted[0][0].slice_steps)
        running.rest()
    assert slices == [0.7, 7.0]


def test_the_others_go_on_when_one_is_cancelled() -> None:
    running = Running()
    running.begin(1, 2)
    running.runner.order(Cancel((1,)))
    events = [event for report in running.rest() for event in report.events]
    kinds = [[type(event) for event in events if event.sequence == key] for key in (1, 2)]
    assert kinds == [[SequenceTokens, SequenceCancelled], [SequenceTokens] * 3 + [SequenceFinished]]


def test_cancelling_nothing_is_reported_too() -> None:
    running = Running()
    orders = running.runner.order(Cancel(None))
    assert running.report() == Report((), (), idle=True, orders=orders)


def test_what_finds_no_room_is_refused_and_the_rest_runs() -> None:
    running = Running(max_sequences=1)
    running.begin(1, 2)
    running.pipeline.gate.put(None)
    first = running.report()
    assert first.events[0] == SequenceRefused(2)
    ended = [event.sequence for event in running.rest()[-1].events]
    assert ended == [1]


def test_a_failing_pipeline_ends_the_engine_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    running = Running()
    running.begin(1)
    error = ConnectionError("a shard is gone")
    running.pipeline.gate.put(error)
    assert running.failures.get(timeout=PATIENCE) == (error, "engine")
    assert running.reports.empty()
    assert [record.getMessage() for record in caplog.records] == ["engine_failed"]


def test_books_that_do_not_balance_end_an_engine_that_becomes_idle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = Running()
    running.begin(1)
    running.loop.scheduler.memory.ledger.free -= 1
    assert [type(event) for event in running.rest()[-1].events] == [SequenceFinished]
    error, thread = running.failures.get(timeout=PATIENCE)
    assert (type(error), thread) == (IntegrityError, "engine")
    (record,) = caplog.records
    assert record.getMessage() == f"integrity_failed what={str(error)!r}"
    assert "are not [64] pages" in str(error)


def test_a_healthy_engine_checks_its_books_once_whenever_it_becomes_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = Running()
    checks: list[bool] = []
    check = running.loop.scheduler.check_integrity

    def counted() -> None:
        checks.append(running.loop.idle)
        check()

    monkeypatch.setattr(running.loop.scheduler, "check_integrity", counted)
    for times in range(3):
        running.runner.order(Cancel(()))  # an order that is none leaves it idle, and is no reason to check
        running.report()
        running.begin(times)
        assert checks == [True] * times
        running.rest()
    assert running.failures.empty()


def test_others_have_the_interpreter_behind_first_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=left.append)
    monkeypatch.setattr(runner_module, "time", clock)
    running = Running()
    running.begin(1)
    assert [report.begins for report in running.rest()] == [True, False, False, False]
    assert left == [runner_module.PASSING_SECONDS]


def test_a_step_stalls_from_its_beginning_until_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=10.0)
    stopped = SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda seconds: None)
    monkeypatch.setattr(runner_module, "time", stopped)
    running = Running()
    assert running.runner.stalled_for() == 0
    running.begin(1)
    clock.now = 15.0
    assert running.runner.stalled_for() == 5
    running.rest()
    clock.now = 30.0
    assert running.runner.stalled_for() == 0
