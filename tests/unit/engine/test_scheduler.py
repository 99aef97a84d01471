"""Continuous batching: whatever comes and goes, every sequence ends once and gives its pages back."""

from collections import Counter, deque

import pytest
from fake_pipeline import PAGES, layout, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyramidserve.types import FinishReason
from workers.compression.policies import plan
from workers.engine import scheduler as scheduler_module
from workers.engine.detokenizer import Detokenizer
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import RunningSequence, SequenceRequest
from workers.engine.step import Step, StepKind

MAX_PREFILL_TOKENS = 10
lengths = st.integers(1, 8) | st.integers(9, 300)


def admit(scheduler: Scheduler, wanted: SequenceRequest) -> bool:
    keep = plan(wanted.compression, len(wanted.prompt_ids), scheduler.layout.layers)
    return scheduler.admit(RunningSequence(wanted, keep, Detokenizer(lambda ids: "x" * len(ids)), 0.0))


def finish(scheduler: Scheduler, step: Step) -> None:
    """Every sequence of the step gets a token, and the step has passed all shards."""
    if step.kind is not StepKind.RELEASE:
        for key in step.sequences:
            sequence = scheduler.sequences[key]
            if not sequence.cancelled:
                sequence.accept(100 + len(sequence.output_ids), 0.0, ())
    scheduler.finish_step(step)


class Serving(RuleBasedStateMachine):
    """Requests, cancellations and the coming and going of steps, in any order."""

    admitted = Bundle[int]("admitted")

    @initialize(shards=st.integers(1, 3), max_sequences=st.integers(1, 6))
    def build(self, shards: int, max_sequences: int) -> None:
        self.shards = shards
        self.scheduler = Scheduler(layout(shards, max_sequences, MAX_PREFILL_TOKENS))
        self.under_way: deque[Step] = deque()
        self.requests: dict[int, SequenceRequest] = {}
        self.ends: Counter[int] = Counter()
        self.tokens: dict[int, int] = {}

    @rule(target=admitted, prompt_tokens=lengths, max_tokens=st.integers(1, 6))
    def ask(self, prompt_tokens: int, max_tokens: int) -> int:
        key = len(self.requests)
        wanted = request(key, prompt_tokens, max_tokens)
        self.requests[key] = wanted
        room = self.scheduler.ledger.fits(self.scheduler.pages(wanted))
        assert admit(self.scheduler, wanted) == room
        assert (key in self.scheduler.sequences) == room
        if not room:
            self.ends[key] += 1
        return key

    @rule(key=admitted)
    def cancel(self, key: int) -> None:
        alive = key in self.scheduler.sequences
        if self.scheduler.cancel(key):
            assert alive
            self.ends[key] += 1

    @rule()
    def send(self) -> None:
        busy = {key for step in self.under_way for key in step.sequences}
        idle = {key: sequence for key, sequence in self.scheduler.sequences.items() if key not in busy}
        fresh = [key for key in idle if key not in self.tokens]
        kinds = Counter(sent.kind for sent in self.under_way)
        work = self.scheduler.next_step()
        if work is None:
            assert not fresh or kinds[StepKind.PREFILL] == self.shards
            assert self.under_way or not self.scheduler.sequences
            return
        step, ids = work
        assert step.sequences
        assert not busy & set(step.sequences)
        self.check_contents(step, ids.tolist())
        self.under_way.append(step)
        kinds[step.kind] += 1
        assert kinds[StepKind.PREFILL] <= self.shards
        assert kinds[StepKind.RELEASE] <= 1
        assert kinds[StepKind.DECODE] <= self.shards

    def check_contents(self, step: Step, ids: list[int]) -> None:
        if step.kind is StepKind.RELEASE:
            assert not ids
            return
        wanted = [self.requests[key] for key in step.sequences]
        done = [self.tokens.get(key, 0) for key in step.sequences]
        assert list(step.output_indices) == done
        if step.kind is StepKind.PREFILL:
            assert sum(step.rows) <= MAX_PREFILL_TOKENS or len(step.rows) == 1
            assert list(step.rows) == [len(each.prompt_ids) for each in wanted]
            assert ids == [token for each in wanted for token in each.prompt_ids]
            assert step.positions.tolist() == [at for each in wanted for at in range(len(each.prompt_ids))]
            assert [spec.sequence for spec in step.new] == list(step.sequences)
        else:
            assert step.rows == (1,) * len(wanted)
            assert ids == [99 + count for count in done]
            ends = zip(wanted, done, strict=True)
            assert step.positions.tolist() == [len(each.prompt_ids) + count - 1 for each, count in ends]

    @rule(at=st.integers(0, 20))
    @precondition(lambda self: bool(self.under_way))
    def come_back(self, at: int = 0) -> None:
        # A short step may overtake a prefill.
        step = self.under_way[at % len(self.under_way)]
        self.under_way.remove(step)
        finish(self.scheduler, step)
        if step.kind is StepKind.RELEASE:
            self.ends.update(step.sequences)
        else:
            self.tokens |= {key: len(self.scheduler.sequences[key].output_ids) for key in step.sequences}

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler.ledger) == len(self.scheduler.sequences)
        assert set(self.ends.values()) <= {1}
        assert self.scheduler.steps_under_way == len(self.under_way)

    def teardown(self) -> None:
        while self.scheduler.sequences:
            self.send()
            if self.under_way:
                self.come_back()
        assert self.ends == Counter(self.requests.keys())
        assert self.scheduler.ledger.free == (PAGES,) * self.shards


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def sent(scheduler: Scheduler) -> list[Step]:
    """All steps that can go now."""
    steps = []
    while (work := scheduler.next_step()) is not None:
        steps.append(work[0])
    return steps


def test_those_that_waited_together_decode_once_behind_each_of_their_prefills() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=10))
    for key in range(3):
        assert admit(scheduler, request(key, 10, 100))
    (prefill,) = sent(scheduler)
    finish(scheduler, prefill)
    # One that comes later does not hold them up.
    assert admit(scheduler, request(3, 10, 100))
    for begun in (1, 2):
        decode, prefill = sent(scheduler)
        assert (decode.kind, decode.sequences) == (StepKind.DECODE, tuple(range(begun)))
        assert (prefill.kind, prefill.sequences) == (StepKind.PREFILL, (begun,))
        finish(scheduler, decode)
        assert sent(scheduler) == []
        finish(scheduler, prefill)
    decode, prefill = sent(scheduler)
    assert prefill.sequences == (3,)
    for _ in range(3):
        assert sorted(decode.sequences) == [0, 1, 2]
        finish(scheduler, decode)
        (decode,) = sent(scheduler)


def test_a_cancelled_one_does_not_hold_those_up_that_waited_with_it() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=10))
    for key in range(4):
        assert admit(scheduler, request(key, 10, 100))
    (first,) = sent(scheduler)
    finish(scheduler, first)
    decode, second = sent(scheduler)
    finish(scheduler, decode)
    assert not scheduler.cancel(0)  # rests
    assert not scheduler.cancel(1)  # is under way
    assert scheduler.cancel(2)  # has not begun
    finish(scheduler, second)
    release, last = sent(scheduler)
    assert (release.kind, release.sequences) == (StepKind.RELEASE, (0, 1))
    assert last.sequences == (3,)
    finish(scheduler, last)
    finish(scheduler, release)
    for _ in range(3):
        (decode,) = sent(scheduler)
        assert decode.sequences == (3,)
        finish(scheduler, decode)


def test_those_that_rest_wake_when_the_last_they_wait_for_is_cancelled() -> None:
    scheduler = Scheduler(layout(2, max_prefill_tokens=10))
    for key in range(3):
        assert admit(scheduler, request(key, 10, 100))
    first, second = sent(scheduler)
    finish(scheduler, first)
    (decode, third) = sent(scheduler)
    finish(scheduler, decode)
    finish(scheduler, second)
    decodes = sent(scheduler)
    for decode in decodes:
        finish(scheduler, decode)
    assert sent(scheduler) == []
    assert not scheduler.cancel(2)
    finish(scheduler, third)
    assert sorted(key for step in sent(scheduler) for key in step.sequences if key < 2) == [0, 1]


def test_a_long_queue_does_not_begin_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "COHORT_PREFILLS", 3)
    scheduler = Scheduler(layout(max_prefill_tokens=10))
    for key in range(5):
        assert admit(scheduler, request(key, 10, 10))
    fourth = None
    while fourth is None:
        for step in sent(scheduler):
            if 3 in step.sequences:
                fourth = step
            else:
                finish(scheduler, step)
    for _ in range(3):
        (decode,) = sent(scheduler)
        assert sorted(decode.sequences) == [0, 1, 2]
        finish(scheduler, decode)


def test_prompts_share_a_prefill_in_order_as_far_as_its_rows_go() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=10))
    for key, prompt_tokens in enumerate((4, 6, 5, 30, 3, 7)):
        assert admit(scheduler, request(key, prompt_tokens, 1))
    batches = []
    while (work := scheduler.next_step()) is not None:
        finish(scheduler, work[0])
        if work[0].kind is StepKind.PREFILL:
            batches.append(work[0].sequences)
    assert batches == [(0, 1), (2,), (3,), (4, 5)]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_sequences_are_spread_over_as_many_decodes_as_there_are_shards(shards: int) -> None:
    scheduler = Scheduler(layout(shards, max_prefill_tokens=60 * shards))
    for key in range(6):
        assert admit(scheduler, request(key, 10, 3))
    (prefill,) = sent(scheduler)
    finish(scheduler, prefill)
    assert [len(step.sequences) for step in sent(scheduler)] == [6 // shards] * shards


def test_a_sequence_that_has_not_begun_is_gone_when_cancelled() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, request(1))
    assert scheduler.cancel(1)
    assert scheduler.next_step() is None
    assert len(scheduler.ledger) == 0
    assert not scheduler.cancel(1)


def test_a_cancelled_sequence_is_released_behind_the_step_that_carries_it() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, request(1))
    (prefill,) = sent(scheduler)
    assert not scheduler.cancel(1)
    assert sent(scheduler) == []
    finish(scheduler, prefill)
    (release,) = sent(scheduler)
    assert (release.kind, release.sequences) == (StepKind.RELEASE, (1,))
    assert len(scheduler.ledger) == 1
    finish(scheduler, release)
    assert len(scheduler.ledger) == 0


def test_a_sequence_without_room_leaves_no_trace() -> None:
    scheduler = Scheduler(layout(max_sequences=1))
    assert admit(scheduler, request(1))
    assert not admit(scheduler, request(2))
    assert list(scheduler.sequences) == [1]
    assert not admit(Scheduler(layout()), request(3, 16 * PAGES))


def test_a_finished_sequence_is_not_decoded_again() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, request(1, max_tokens=1))
    (prefill,) = sent(scheduler)
    finish(scheduler, prefill)
    assert scheduler.sequences[1].finish_reason is FinishReason.LENGTH
    assert [step.kind for step in sent(scheduler)] == [StepKind.RELEASE]
