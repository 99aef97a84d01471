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


FIRST, SECOND = (5, 6, 7), (5, 6, 7, 100, 101, 102, 103, 8)
KINDS: dict[str, tuple[StepKind, tuple[int, ...]]] = {
    "prefill": (StepKind.PREFILL, SECOND),
    "decode": (StepKind.DECODE, (*SECOND, 100)),
    "park": (StepKind.PARK, (*SECOND, 100, 101, 102)),
}


def advance(scheduler: Scheduler, kind: StepKind) -> Step:
    """Runs until a step of ``kind`` is under way, which it returns."""
    while (work := scheduler.next_step()) is not None and work[0].kind is not kind:
        finish(scheduler, work[0])
    assert work is not None
    return work[0]


@pytest.mark.parametrize("during", ["waiting", *KINDS])
def test_a_cancelled_turn_leaves_what_was_verified(during: str) -> None:
    scheduler = Scheduler(layout())
    serve(scheduler, turn(1, FIRST))
    assert admit(scheduler, turn(2, SECOND))
    left: tuple[int, ...] = (*FIRST, 100, 101, 102)
    if during == "waiting":
        assert scheduler.cancel(2)
    else:
        kind, left = KINDS[during]
        under_way = advance(scheduler, kind)
        assert not scheduler.cancel(2)
        finish(scheduler, under_way)
    run(scheduler, lambda: scheduler.idle)
    assert parked_ids(scheduler) == left
    serve(scheduler, turn(3, (*SECOND, 9)))
    assert len(scheduler.parked) == 1
    scheduler.end_session("a")
    run(scheduler, lambda: scheduler.idle)
    assert scheduler.memory.ledger.free.tolist() == [PAGES]


def test_a_turn_that_is_cancelled_between_two_steps_leaves_what_was_verified() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, turn(1, FIRST))
    finish(scheduler, advance(scheduler, StepKind.PREFILL))
    assert not scheduler.cancel(1)
    run(scheduler, lambda: scheduler.idle)
    assert parked_ids(scheduler) == FIRST


def test_a_cancelled_turn_that_had_made_room_is_parked_on_the_host() -> None:
    scheduler = Scheduler(layout(max_prefill_tokens=1000))
    assert admit(scheduler, replace(turn(1, tuple(range(200)), "b", 300), expected_tokens=4))
    assert admit(scheduler, replace(turn(2, tuple(range(1000, 1200)), "a", 300), expected_tokens=4))
    run(scheduler, lambda: bool(scheduler.memory.suspended))
    scheduler.cancel(2)
    run(scheduler, lambda: scheduler.parked.get("a") is not None)
    session = scheduler.parked.get("a")
    assert session is not None
    assert session.on_host
    assert session.generated > 0
    scheduler.check_integrity()


def test_a_cancelled_turn_takes_the_place_of_no_other() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, turn(1, FIRST, max_tokens=40))
    finish(scheduler, advance(scheduler, StepKind.PREFILL))
    assert admit(scheduler, turn(2, SECOND, max_tokens=2))
    run(scheduler, lambda: scheduler.parked.get("a") is not None)
    scheduler.cancel(1)
    run(scheduler, lambda: scheduler.idle)
    assert parked_ids(scheduler) == (*SECOND, 100)


@pytest.mark.parametrize("during", ["waiting", *KINDS])
def test_a_turn_whose_session_ends_meanwhile_leaves_nothing(during: str) -> None:
    scheduler = Scheduler(layout())
    serve(scheduler, turn(1, FIRST))
    assert admit(scheduler, turn(2, SECOND))
    under_way = None if during == "waiting" else advance(scheduler, KINDS[during][0])
    scheduler.end_session("a")
    scheduler.end_session("a")
    if under_way is not None:
        finish(scheduler, under_way)
    run(scheduler, lambda: scheduler.idle)
    assert not scheduler.parked
    assert scheduler.memory.ledger.free.tolist() == [PAGES]


def test_a_turn_of_an_ended_session_has_nothing_to_do_with_what_comes_behind() -> None:
    scheduler = Scheduler(layout())
    assert admit(scheduler, turn(1, FIRST, max_tokens=40))
    finish(scheduler, advance(scheduler, StepKind.PREFILL))
    scheduler.end_session("a")
    assert admit(scheduler, turn(2, SECOND, max_tokens=2))
    run(scheduler, lambda: scheduler.idle)
    assert parked_ids(scheduler) == (*SECOND, 100)


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
    session = ParkedSession(1, "a", (1, 2, 3, 4, 5, 6), 4, compression, whole, 0.0, shared=6)
    asked = replace(turn(2, prompt_ids), compression=compression)
    assert session.reusable(asked) == reused
    assert session.reusable(replace(asked, compression=Compression("streaming"))) == 0
    # Heads have others of what would have to be taken back.
    assert replace(session, shared=6 - reused).reusable(asked) == reused
    assert not reused or replace(session, shared=6 - reused - 1).reusable(asked) == 0
