"""What a turn leaves waits for the next, and makes room when others need it."""

from dataclasses import replace

import pytest
from fake_pipeline import PAGES, layout, request
from test_scheduler import admit, finish, run

from pyramidserve.types import Compression
from workers.schedule.parked import ParkedSession
from workers.schedule.scheduler import Scheduler
from workers.schedule.sequence import SequenceRequest
from workers.schedule.step import Step, StepKind

FULL, PRUNE, EVICT = Compression(), Compression("pyramid", "prune"), Compression("pyramid", "evict")


def turn(
    key: int, prompt_ids: tuple[int, ...], session_id: str = "a", max_tokens: int = 4
) -> SequenceRequest:
    return replace(request(key, 1, max_tokens), prompt_ids=prompt_ids, session_id=session_id)


def serve(scheduler: Scheduler, wanted: SequenceRequest) -> list[Step]:
    assert admit(scheduler, wanted)
    return run(scheduler, lambda: scheduler.idle)


def parked_ids(scheduler: Scheduler, session_id: str = "a") -> tuple[int, ...]:
    session = scheduler.parked.get(session_id)
    assert session is not None
    return session.ids


def test_the_next_turn_computes_only_what_is_new() -> None:
    scheduler = Scheduler(layout())
    first = serve(scheduler, turn(1, (5, 6, 7)))
    assert [step.kind for step in first] == [StepKind.PREFILL, *[StepKind.DECODE] * 3, StepKind.PARK]
    # The last output was never fed.
    assert parked_ids(scheduler) == (5, 6, 7, 100, 101, 102)
    assert admit(scheduler, turn(2, (5, 6, 7, 100, 101, 102, 103, 8)))
    work = scheduler.next_step()
    assert work is not None
    prefill, ids = work
    (spec,) = prefill.new
    assert (spec.continues, spec.reused, spec.recall) == (1, 6, False)
    assert ids.tolist() == [103, 8]
    assert prefill.positions.tolist() == [6, 7]
    assert scheduler.sequences[2].reused == 6
    finish(scheduler, prefill)
    run(scheduler, lambda: scheduler.idle)
    assert parked_ids(scheduler) == (5, 6, 7, 100, 101, 102, 103, 8, 100, 101, 102)
    assert len(scheduler.parked) == 1


def test_a_session_that_others_need_the_room_of_moves_to_the_host_and_back() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=1000, host_pages=2 * PAGES))
    serve(scheduler, turn(1, tuple(range(300))))  # 38 pages of 64
    moved = serve(scheduler, turn(2, tuple(range(1000, 1300)), "b"))
    assert [step.sequences for step in moved if step.kind is StepKind.SUSPEND] == [(1,)]
    back = serve(scheduler, turn(3, (*parked_ids(scheduler), 9)))
    kinds = [step.kind for step in back if step.kind is not StepKind.DECODE]
    assert kinds == [StepKind.SUSPEND, StepKind.RESUME, StepKind.PREFILL, StepKind.PARK]
    assert [back[0].sequences, back[1].sequences] == [(2,), (1,)]
    assert back[2].new[0].reused == 303


def test_where_the_host_is_full_the_least_recently_used_session_is_given_up() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=1000, host_pages=40))
    for key, session_id in enumerate("abc", 1):
        serve(scheduler, turn(key, tuple(range(1000 * key, 1000 * key + 300)), session_id))
    assert [session.session_id for session in scheduler.parked] == ["b", "c"]
    anew = serve(scheduler, turn(4, tuple(range(1000, 1304))))
    (prefill,) = [step for step in anew if step.kind is StepKind.PREFILL]
    assert prefill.new[0].continues == 0
    scheduler.check_integrity()


def test_a_session_too_large_to_go_on_beside_itself_begins_anew() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=1000, host_pages=0))
    serve(scheduler, turn(1, tuple(range(400)), max_tokens=1))
    assert admit(scheduler, turn(2, tuple(range(2000, 2400)), "b", max_tokens=2))
    steps = run(scheduler, lambda: scheduler.idle)
    assert [step.kind for step in steps] == [
        StepKind.RELEASE,
        StepKind.PREFILL,
        StepKind.DECODE,
        StepKind.PARK,
    ]


def test_sessions_end_expire_and_are_bounded() -> None:
    scheduler = Scheduler(layout(max_sessions=2))
    for key, session_id in enumerate("abc", 1):
        serve(scheduler, turn(key, (5, 6, 7), session_id))
    assert [session.session_id for session in scheduler.parked] == ["b", "c"]
    scheduler.end_session("b")
    scheduler.end_session("unheard of")
    run(scheduler, lambda: scheduler.idle)
    assert [session.session_id for session in scheduler.parked] == ["c"]
    scheduler.expire(since=0.0)
    assert len(scheduler.parked) == 1
    scheduler.expire(since=1.0)
    run(scheduler, lambda: scheduler.idle)
    assert scheduler.memory.ledger.free.tolist() == [PAGES]


def test_a_turn_that_is_cancelled_leaves_nothing() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, turn(1, (5, 6, 7), max_tokens=2))
    run(scheduler, lambda: scheduler.sequences[1].finish_reason is not None)
    work = scheduler.next_step()
    assert work is not None
    assert work[0].kind is StepKind.PARK
    scheduler.cancel(1)
    finish(scheduler, work[0])
    run(scheduler, lambda: scheduler.idle)
    assert not scheduler.parked
    assert scheduler.memory.ledger.free.tolist() == [PAGES]


@pytest.mark.parametrize(
    ("compression", "prompt_ids", "whole", "reused"),
    [
        (FULL, (1, 2, 3, 4, 5, 6, 7), True, 6),  # the last token's output is wanted
        (FULL, (1, 2, 3, 4, 5, 6), True, 5),
        (FULL, (1, 2, 9, 4, 5, 6, 7), True, 2),
        (FULL, (9, 2, 3), True, 0),
        (EVICT, (1, 2, 9, 4, 5, 6, 7), True, 2),
        (EVICT, (1, 2, 9, 4, 5, 6, 7), False, 0),
        (EVICT, (1, 2, 3, 4, 9, 6, 7), False, 4),
        (PRUNE, (1, 2, 3, 4, 9, 6, 7), True, 4),
        (PRUNE, (1, 2, 3, 9, 5, 6, 7), True, 0),
    ],
)
def test_what_can_be_reused_of_a_history_that_has_changed(
    compression: Compression, prompt_ids: tuple[int, ...], whole: bool, reused: int
) -> None:
    session = ParkedSession(1, "a", (1, 2, 3, 4, 5, 6), 4, compression, whole, 0.0)
    asked = replace(turn(2, prompt_ids), compression=compression)
    assert session.reusable(asked) == reused
    assert session.reusable(replace(asked, compression=Compression("streaming"))) == 0
