"""Continuous batching: whatever comes and goes, every sequence ends once and gives its pages back."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_pipeline import PAGES, Spoken, layout, released, request
from fuzz import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyramidserve.types import Compression, FinishReason
from workers.budget.footprint import ShardLayout, index_rows, score_pages, sink_pages
from workers.budget.kv_format import KV_FORMATS
from workers.budget.pages import pages_for
from workers.budget.plan import KeepPlan
from workers.policies.registry import plan
from workers.schedule.accept import accept
from workers.schedule.detokenizer import Detokenizer
from workers.schedule.drafts import Drafting
from workers.schedule.scheduler import Scheduler, steps_at_most
from workers.schedule.sequence import RunningSequence, SequenceRequest
from workers.schedule.step import Step, StepKind
from workers.schedule.tuning import ScheduleTuning

COMPUTING = (StepKind.PREFILL, StepKind.DECODE, StepKind.VERIFY)
MOVING = (StepKind.RELEASE, StepKind.PARK, StepKind.SUSPEND, StepKind.RESUME)
WINDOW = {"sinks": 2, "window": 20}
PYRAMID = {
    "prefill_decay_ratio": 0.5,
    "min_context_length": 4,
    "streamingllm_sink_len": 2,
    "exceed_length_to_compress": 16,
}
COMPRESSIONS = (
    Compression(),
    Compression("streaming", parameters=WINDOW),
    Compression("streaming", parameters=WINDOW, recall="exact"),
    Compression("streaming", parameters=WINDOW, recall="step"),
    *(
        Compression("pyramid", prefill, parameters=PYRAMID, recall=recall)
        for prefill, recall in (
            ("prune", "off"),
            ("prune", "turn"),
            ("evict", "off"),
            ("evict", "turn"),
            ("evict", "step"),
            ("evict", "exact"),
        )
    ),
)
MAX_PREFILL_TOKENS = 10
lengths = st.integers(1, 8) | st.integers(9, 300)


def running(wanted: SequenceRequest, layers: int = 4) -> RunningSequence:
    keep = plan(wanted.compression, len(wanted.prompt_ids), layers)
    sequence = RunningSequence(wanted, keep, Detokenizer(Spoken(lambda ids: "x" * len(ids))), 0.0)
    sequence.drafting = Drafting(keep.drafts) if keep.drafts else None
    return sequence


def admit(scheduler: Scheduler, wanted: SequenceRequest) -> bool:
    return scheduler.admit(running(wanted, scheduler.layout.layers))


def finish(scheduler: Scheduler, step: Step) -> None:
    """Every sequence of a step that computes gets its tokens, and the step has passed all shards.

    Output i is 100 + i; every fifth draft is wrong.
    """
    if step.kind in COMPUTING:
        drawn = [
            100 + index if forced < 0 else forced
            for index, forced in zip(step.output_indices, step.forced, strict=True)
        ]
        if step.kind is StepKind.DECODE:
            for row, key in enumerate(step.sequences):
                if scheduler.sequences[key].drafting and not (drawn[row] + step.number) % 5:
                    drawn[row] = 7
        accept(step, drawn, scheduler.sequences, (), 0.0)
    if step.kind is StepKind.PARK:
        step = replace(step, released=((released(0),) * len(step.sequences),))
    scheduler.finish_step(step)


def index_pages(keep: KeepPlan, layer: int, fed: int) -> int:
    """Of the index of what a layer has on the host."""
    spilled = keep.prompt_tokens + fed - keep.tokens(layer, fed)
    return pages_for(index_rows(spilled, KV_FORMATS["float32"])) if keep.indexes else 0


class Shards:
    """What the shards of a pipeline hold, as steps that pass them tell; fails where there is no room."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.layout = scheduler.layout
        self.plans: dict[int, KeepPlan] = {}
        # Of those on the device: tokens that a shard knows to be verified, and others.
        self.fed: dict[int, int] = {}
        self.ahead: Counter[int] = Counter()
        self.suspended: dict[int, int] = {}
        self.took_over: dict[int, tuple[KeepPlan, int]] = {}

    def pages(self, key: int, shard: ShardLayout, fed: int) -> int:
        keep = self.plans[key]
        pages = score_pages(keep, shard) + sink_pages(keep, shard)
        for layer in range(shard.first, shard.end):
            tokens, index = keep.tokens(layer, fed) + self.ahead[key], index_pages(keep, layer, fed)
            if key in self.took_over:
                left, generated = self.took_over[key]
                tokens = max(tokens, left.tokens(layer, generated))
                index = max(index, index_pages(left, layer, generated))
            pages += pages_for(tokens) + index
        return pages

    def sent(self, step: Step) -> None:
        """The step is on its way, and may be in any shard."""
        match step.kind:
            case StepKind.PREFILL:
                for spec in step.new:
                    assert spec.sequence not in self.fed
                    assert spec.sequence not in self.suspended
                    self.plans[spec.sequence] = plan(
                        spec.compression, spec.prompt_tokens, self.layout.layers
                    )
                    self.fed[spec.sequence] = 0
                    if spec.continues:
                        left = (self.plans.pop(spec.continues), self.fed.pop(spec.continues))
                        self.took_over[spec.sequence] = left
                        del self.ahead[spec.continues]
            case StepKind.RESUME:
                (key,) = step.sequences
                self.fed[key] = self.suspended[key]
            case StepKind.DECODE:
                self.ahead.update(dict(zip(step.sequences, step.rows, strict=True)))
            case StepKind.VERIFY:
                for key, rows in zip(step.sequences, step.rows, strict=True):
                    assert self.ahead[key] <= self.plans[key].drafts + 1
                    self.ahead[key] = max(rows, self.ahead[key])
        for shard, pages in zip(self.layout.shards, self.layout.pages, strict=True):
            assert sum(self.pages(key, shard, fed) for key, fed in self.fed.items()) <= pages

    def passed(self, step: Step) -> None:
        """The step has passed the last shard."""
        for row, key in enumerate(step.sequences):
            if key in self.fed and self.plans[key].drafts and step.generated[row]:
                self.fed[key] = step.generated[row]
                self.ahead[key] = 0
            match step.kind:
                case StepKind.PARK:
                    self.ahead[key] = 0
                case StepKind.PREFILL:
                    self.took_over.pop(key, None)
                case StepKind.DECODE if self.plans[key].drafts:
                    self.ahead[key] += 1
                case StepKind.DECODE:
                    self.ahead[key] -= step.rows[row]
                    self.fed[key] += step.rows[row]
                case StepKind.VERIFY:
                    self.ahead[key] = step.rows[row]
                case StepKind.SUSPEND:
                    self.suspended[key] = self.fed.pop(key)
                case StepKind.RESUME:
                    del self.suspended[key]
                case StepKind.RELEASE:
                    del self.plans[key]
                    del self.ahead[key]
                    assert (key in self.fed) != (key in self.suspended)
                    self.fed.pop(key, None)
                    self.suspended.pop(key, None)
        for shard, pages in zip(self.layout.shards, self.layout.host_pages, strict=True):
            spilled = {**self.fed, **self.suspended}
            on_host = sum(self.pages(key, shard, fed) for key, fed in self.suspended.items())
            on_host += sum(
                pages_for(keep.prompt_tokens + spilled[key] - keep.tokens(layer, spilled[key]))
                for key, keep in self.plans.items()
                if keep.spills_all
                for layer in range(shard.first, shard.end)
            )
            assert on_host <= pages


class Serving(RuleBasedStateMachine):
    """Requests, cancellations, turns of sessions, and the coming and going of steps, in any order."""

    admitted = Bundle[int]("admitted")

    @initialize(
        shards=st.integers(1, 3),
        max_sequences=st.integers(1, 6),
        host_pages=st.sampled_from([0, 30, 1000]),
        max_sessions=st.sampled_from([0, 1, 3]),
    )
    def build(self, shards: int, max_sequences: int, host_pages: int, max_sessions: int) -> None:
        self.shards = shards
        self.scheduler = Scheduler(
            layout(shards, max_sequences, MAX_PREFILL_TOKENS, host_pages, max_sessions)
        )
        self.held = Shards(self.scheduler)
        self.under_way: deque[Step] = deque()
        self.requests: dict[int, SequenceRequest] = {}
        self.ends: Counter[int] = Counter()
        # Those whose sessions were ended since they came.
        self.nobodys: set[int] = set()
        # Outputs that each sequence is known to have, as its steps have come back.
        self.reached: Counter[int] = Counter()

    @rule(
        target=admitted,
        prompt_tokens=lengths,
        max_tokens=st.integers(1, 6) | st.integers(1, 200),
        compression=st.sampled_from(COMPRESSIONS),
        session_id=st.sampled_from(["", "a", "b", "c"]),
    )
    def ask(self, prompt_tokens: int, max_tokens: int, compression: Compression, session_id: str) -> int:
        key = len(self.requests) + 1
        wanted = request(key, prompt_tokens, max_tokens)
        return self.submit(replace(wanted, compression=compression, session_id=session_id))

    @rule(
        target=admitted,
        which=st.integers(0, 2),
        common=st.sampled_from([1.0, 1.0, 0.9, 0.5]),
        more=st.integers(1, 20),
        max_tokens=st.integers(1, 60),
    )
    @precondition(lambda self: bool(self.scheduler.parked))
    def next_turn(self, which: int, common: float, more: int, max_tokens: int) -> int:
        session = list(self.scheduler.parked)[which % len(self.scheduler.parked)]
        wanted = request(len(self.requests) + 1, more, max_tokens)
        past = session.ids[: int(common * len(session.ids))]
        return self.submit(
            replace(
                wanted,
                prompt_ids=(*past, *wanted.prompt_ids),
                compression=session.compression,
                session_id=session.session_id,
            )
        )

    def submit(self, wanted: SequenceRequest) -> int:
        key, memory = wanted.sequence, self.scheduler.memory
        self.requests[key] = wanted
        possible = memory.could_ever_hold(wanted) and memory._host_has_room(memory.host_pages(wanted))
        room = possible and not memory.full
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

    @rule(session_id=st.sampled_from(["a", "b", "c"]))
    def end_session(self, session_id: str) -> None:
        self.scheduler.end_session(session_id)
        self.nobodys |= {key for key, each in self.requests.items() if each.session_id == session_id}

    @rule()
    def send(self) -> None:
        busy = {key for step in self.under_way for key in step.sequences}
        kinds = Counter(sent.kind for sent in self.under_way)
        work = self.scheduler.next_step()
        if work is None:
            assert self.under_way or self.scheduler.idle
            return
        step, ids = work
        assert step.sequences
        assert not busy & set(step.sequences)
        self.check_contents(step, ids.tolist())
        self.held.sent(step)
        self.under_way.append(step)
        kinds[step.kind] += 1
        assert len(self.under_way) <= steps_at_most(self.shards)
        assert kinds[StepKind.PREFILL] <= self.shards
        assert kinds[StepKind.DECODE] + kinds[StepKind.VERIFY] <= self.shards
        assert sum(kinds[kind] for kind in MOVING) <= 1

    def check_contents(self, step: Step, ids: list[int]) -> None:
        if step.kind not in COMPUTING:
            assert not ids
            return
        outputs = iter(zip(step.output_indices, step.forced, strict=True))
        given = iter(zip(ids, step.positions.tolist(), strict=True))
        for row, key in enumerate(step.sequences):
            wanted, sequence = self.requests[key], self.scheduler.sequences[key]
            # Output i is fed at position prompt + i, and what follows it is output i + 1.
            done, first = self.reached[key], 0
            if step.kind is StepKind.PREFILL:
                spec = step.new[row]
                assert spec.sequence == key
                assert spec.prompt_tokens == len(wanted.prompt_ids) == spec.reused + step.rows[row]
                first, history = spec.reused, list(wanted.prompt_ids)
            else:
                history = [*wanted.prompt_ids, *sequence.output_ids[:done], *sequence.ahead_ids]
                first = len(wanted.prompt_ids) + done - 1
                if step.kind is StepKind.DECODE:
                    first += len(sequence.drafts)
                if step.rows[row] > 1 and step.kind is StepKind.DECODE:
                    history = [*wanted.prompt_ids, *sequence.output_ids[: done - 1 + step.rows[row]]]
                    generation = sequence.plan.generation
                    assert generation is None or step.rows[row] <= generation.until_chunk(done - 1)
            fed = [next(given) for _ in range(step.rows[row])]
            assert fed == [(history[at], at) for at in range(first, first + len(fed))]
            for last in range(first, first + len(fed)) if step.kind is StepKind.VERIFY else [None]:
                index, forced = next(outputs)
                at = first + len(fed) - 1 if last is None else last
                assert index == at + 1 - len(wanted.prompt_ids)
                known = sequence.output_ids
                assert forced == (known[index] if index < len(known) else -1)
        if step.kind is StepKind.PREFILL:
            assert sum(step.rows) <= MAX_PREFILL_TOKENS or len(step.rows) == 1
        assert next(given, None) is next(outputs, None) is None

    @rule(at=st.integers(0, 20))
    @precondition(lambda self: bool(self.under_way))
    def come_back(self, at: int = 0) -> None:
        # A short step may overtake a prefill.
        step = self.under_way[at % len(self.under_way)]
        self.under_way.remove(step)
        self.held.passed(step)
        finish(self.scheduler, step)
        for key in step.sequences:
            if key in self.scheduler.sequences:
                self.reached[key] = self.scheduler.sequences[key].reached
            elif step.kind is StepKind.PARK or (step.kind is StepKind.RELEASE and self.ends[key] == 0):
                self.ends[key] += 1

    @rule(steps=st.integers(1, 200))
    def run(self, steps: int) -> None:
        """Sends what can go and takes it back, in order."""
        for _ in range(steps):
            self.send()
            if len(self.under_way) > self.shards:
                self.come_back()

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler.memory) == len(self.scheduler.sequences)
        assert len(self.scheduler.sequences) <= self.scheduler.layout.max_sequences
        assert len(self.scheduler.parked) <= self.scheduler.layout.max_sessions
        assert set(self.ends.values()) <= {1}
        for session in self.scheduler.parked:
            assert session.key not in self.nobodys
            assert session.generated == {**self.held.fed, **self.held.suspended}[session.key]
        assert self.scheduler.steps_under_way == len(self.under_way)

    def teardown(self) -> None:
        while self.scheduler.sequences:
            self.send()
            if self.under_way:
                self.come_back()
        assert self.ends == Counter(self.requests.keys())
        for session in self.scheduler.parked:
            self.scheduler.end_session(session.session_id)
        while not self.scheduler.idle:
            self.send()
            if self.under_way:
                self.come_back()
        assert self.scheduler.memory.ledger.free.tolist() == [PAGES] * self.shards
        assert not self.held.fed
        assert not self.held.suspended


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=examples(80), stateful_step_count=60)


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
    for begun in (1, 2):
        decode, prefill = sent(scheduler)
        if begun == 1:  # one that comes later does not hold them up
            assert admit(scheduler, request(3, 10, 100))
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


def test_a_burst_of_which_one_came_first_decodes_together() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=10))
    assert admit(scheduler, request(0, 10, 100))
    (prefill,) = sent(scheduler)
    for key in (1, 2):  # while it is prefilled
        assert admit(scheduler, request(key, 10, 100))
    finish(scheduler, prefill)
    for begun in (1, 2):
        decode, prefill = sent(scheduler)
        assert (decode.sequences, prefill.sequences) == (tuple(range(begun)), (begun,))
        finish(scheduler, decode)
        assert sent(scheduler) == []
        finish(scheduler, prefill)
    (decode,) = sent(scheduler)
    assert sorted(decode.sequences) == [0, 1, 2]


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


def test_a_long_queue_does_not_begin_all_at_once() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=10, tuning=ScheduleTuning(cohort_prefills=3)))
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


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_as_many_steps_as_may_be_are_under_way_and_never_more(shards: int) -> None:
    scheduler = Scheduler(layout(shards, 3 * shards, max_prefill_tokens=10 * shards))
    for key in range(shards):
        assert admit(scheduler, request(key, 10, 100))
    while not all(sequence.reached for sequence in scheduler.sequences.values()):
        for step in sent(scheduler):
            finish(scheduler, step)
    decodes = sent(scheduler)
    for key in range(shards, 2 * shards + 1):
        assert admit(scheduler, request(key, 10, 1))
    ending, *prefills = sent(scheduler)
    finish(scheduler, ending)
    under_way = [*decodes, *prefills, *sent(scheduler)]
    assert Counter(step.kind for step in under_way) == {
        StepKind.DECODE: shards,
        StepKind.PREFILL: shards,
        StepKind.RELEASE: 1,
    }
    assert scheduler.steps_under_way == len(under_way) == steps_at_most(shards)


def test_a_sequence_that_has_not_begun_is_gone_when_cancelled() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, request(1))
    assert scheduler.cancel(1)
    assert scheduler.next_step() is None
    assert len(scheduler.memory) == 0
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
    assert len(scheduler.memory) == 1
    finish(scheduler, release)
    assert len(scheduler.memory) == 0


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


def run(scheduler: Scheduler, until: Callable[[], bool]) -> list[Step]:
    """Sends steps and takes them back until it is so; returns them."""
    steps = []
    while not until():
        work = scheduler.next_step()
        assert work is not None
        steps.append(work[0])
        finish(scheduler, work[0])
    return steps


def test_the_youngest_makes_room_and_comes_back_where_it_was() -> None:
    scheduler = Scheduler(layout())
    for key in range(3):  # of 64 pages, each takes 2 at first and 26 at its end
        assert admit(scheduler, request(key, 10, 200))
    steps = run(scheduler, lambda: not scheduler.sequences)
    moves = [
        (step.kind, step.sequences)
        for step in steps
        if step.kind not in (StepKind.PREFILL, StepKind.DECODE)
    ]
    assert moves == [
        (StepKind.SUSPEND, (2,)),
        (StepKind.RELEASE, (0,)),
        (StepKind.RELEASE, (1,)),
        (StepKind.RESUME, (2,)),
        (StepKind.RELEASE, (2,)),
    ]
    counts = Counter(key for step in steps if step.kind is StepKind.DECODE for key in step.sequences)
    assert counts == {0: 199, 1: 199, 2: 199}


def test_what_the_host_has_no_room_for_is_computed_again() -> None:
    scheduler = Scheduler(layout(host_pages=10))
    for key in range(3):
        assert admit(scheduler, request(key, 10, 200))
    sequence = scheduler.sequences[2]
    run(scheduler, lambda: sequence.preemptions > 0 and sequence.reached == 0)
    before = list(sequence.output_ids)
    assert len(before) > 100
    steps = run(scheduler, lambda: not scheduler.sequences)
    assert sequence.preemptions == 1
    assert sequence.output_ids[: len(before)] == before
    assert sequence.output_ids == list(range(100, 300))
    forced = [
        forced
        for step in steps
        for key, forced in zip(step.sequences, step.forced, strict=True)
        if key == 2 and step.kind is not StepKind.RELEASE
    ]
    assert forced.count(-1) == 200 - len(before)
    # Known outputs are fed many at a time; what a step draws behind them is known too, or new.
    known = [each for each in forced if each >= 0]
    assert known == [before[each - 100] for each in known]
    assert len(known) <= 1 + len(before) / 32
    assert StepKind.SUSPEND not in {step.kind for step in steps}


def test_none_begins_while_one_waits_to_come_back() -> None:
    scheduler = Scheduler(layout())
    for key in range(3):
        assert admit(scheduler, request(key, 10, 200))
    run(scheduler, lambda: scheduler.sequences[2].preemptions > 0)
    wanted = request(3, 1, 1)
    assert not scheduler.memory.probably_fits(wanted)
    assert admit(scheduler, wanted)
    steps = run(scheduler, lambda: 3 not in scheduler.sequences)
    kinds = [step.kind for step in steps]
    assert kinds.index(StepKind.RESUME) < kinds.index(StepKind.PREFILL)


def test_those_that_rest_wake_when_there_is_no_room_for_whom_they_wait_for() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=10))
    for key in range(3):
        assert admit(scheduler, request(key, 160, 40))  # 20 pages and more
    assert admit(scheduler, request(3, 160, 2))
    steps = run(scheduler, lambda: not scheduler.sequences)
    assert sum(step.kind is StepKind.PREFILL for step in steps) == 4


@pytest.mark.parametrize("when", ["suspending", "suspended", "resuming"])
def test_a_preempted_sequence_can_be_cancelled(when: str) -> None:
    scheduler = Scheduler(layout())
    for key in range(3):
        assert admit(scheduler, request(key, 10, 200))
    kind = StepKind.RESUME if when == "resuming" else StepKind.SUSPEND
    while (work := scheduler.next_step()) is not None and work[0].kind is not kind:
        finish(scheduler, work[0])
    assert work is not None
    if when == "suspended":
        finish(scheduler, work[0])
    assert not scheduler.cancel(2)
    scheduler.check_integrity()
    if when != "suspended":
        finish(scheduler, work[0])
    (release, *_) = run(scheduler, lambda: 2 not in scheduler.sequences)
    assert (release.kind, release.sequences) == (StepKind.RELEASE, (2,))
    run(scheduler, lambda: not scheduler.sequences)
    scheduler.check_integrity()
    assert scheduler.memory.ledger.free.tolist() == [PAGES]


def test_those_that_rest_wake_when_one_that_made_room_cannot_come_back() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=224))
    assert admit(scheduler, request(0, 128, 19))
    assert admit(scheduler, request(1, 128, 200))
    while len(scheduler.sequences[1].output_ids) < 1:
        for step in sent(scheduler):
            finish(scheduler, step)
    assert admit(scheduler, request(2, 224, 100))
    assert admit(scheduler, request(3, 10, 5))
    slow: Step | None = None
    while 0 in scheduler.sequences:  # 0 grows, and 1 makes room, while 2 is prefilled
        for step in sent(scheduler):
            if step.kind is StepKind.PREFILL:
                slow = step
            else:
                finish(scheduler, step)
    assert slow is not None
    assert slow.sequences == (2,)
    assert list(scheduler.memory.suspended) == [1]
    finish(scheduler, slow)
    while scheduler.sequences:
        steps = sent(scheduler)
        assert steps, "nobody goes on"
        for step in steps:
            finish(scheduler, step)
