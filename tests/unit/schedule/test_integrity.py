"""A sequence is in one place, the one that its phase says; whatever else the books say is found."""

from collections.abc import Callable

import pytest
from fake_pipeline import layout, request
from test_parked import turn
from test_scheduler import admit, run, running

from workers.budget.pages import IntegrityError
from workers.schedule.phase import MOVES, Phase
from workers.schedule.roster import Roster
from workers.schedule.scheduler import Scheduler
from workers.schedule.step import StepKind


def busy() -> Scheduler:
    """0 and 1 are ready, 2 is suspended, 3 waits; what session "a" has left is on the host."""
    scheduler = Scheduler(layout())
    assert admit(scheduler, turn(8, (5, 6, 7), "a"))
    run(scheduler, lambda: scheduler.idle)
    for key in range(3):
        assert admit(scheduler, request(key, 10, 200))
    run(scheduler, lambda: scheduler.sequences[2].phase is Phase.SUSPENDED)
    assert admit(scheduler, request(3))
    scheduler.check_integrity()
    return scheduler


def plant_page(scheduler: Scheduler) -> None:
    scheduler.memory.ledger.free -= 1


def plant_waiting_with_pages(scheduler: Scheduler) -> None:
    scheduler.memory.ledger.hold([3], scheduler.memory.ledger.held(0)[None] * 0 + 1)


def plant_phase(key: int, phase: Phase) -> Callable[[Scheduler], None]:
    def plant(scheduler: Scheduler) -> None:
        scheduler.sequences[key].phase = phase

    return plant


PLANTS: dict[str, Callable[[Scheduler], object]] = {
    "in two queues": lambda scheduler: scheduler.roster.ended.update({0: None}),
    "in no queue": lambda scheduler: scheduler.roster.ready.pop(0),
    "in a queue and not known": lambda scheduler: scheduler.roster.ready.update({7: None}),
    "known and in a queue of others": lambda scheduler: scheduler.sequences.pop(3),
    "ready, said to be carried": plant_phase(0, Phase.DECODING),
    "ready, said to rest": plant_phase(0, Phase.RESTING),
    "suspended, said to be ready": plant_phase(2, Phase.READY),
    "waiting, said to be ready": plant_phase(3, Phase.READY),
    "suspended, and memory does not know": lambda scheduler: scheduler.memory.suspended.pop(2),
    "ready, and memory has it on the host": lambda scheduler: scheduler.memory.suspended.update(
        {0: scheduler.memory.suspended.pop(2)}
    ),
    "ready, and its cohort waits for it": lambda scheduler: scheduler.roster.cohorts.form([0]),
    "a session that nobody knows": lambda scheduler: scheduler.parked.remove("a"),
    "a session that memory does not know": lambda scheduler: scheduler.memory.parked.pop(8),
    "a session said to be on the device": lambda scheduler: setattr(
        scheduler.parked.get("a"), "on_host", False
    ),
    "a page that nobody has": plant_page,
    "waiting, and holds pages": plant_waiting_with_pages,
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_inconsistency_is_found(name: str) -> None:
    scheduler = busy()
    PLANTS[name](scheduler)
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()


def test_a_sequence_that_a_step_carries_is_in_no_queue() -> None:
    scheduler = busy()
    work = scheduler.next_step()
    assert work is not None
    assert (work[0].kind, work[0].sequences) == (StepKind.DECODE, (0, 1))
    scheduler.check_integrity()
    scheduler.roster.ready[0] = None
    with pytest.raises(IntegrityError, match=r"0 is decoding, but in the places \['ready', 'step"):
        scheduler.check_integrity()


def test_a_sequence_goes_only_from_a_phase_to_those_that_may_follow_it() -> None:
    for before in Phase:
        for after in Phase:
            roster = Roster()
            roster.add(running(request(1)))
            roster.waiting.clear()
            roster.sequences[1].phase = before
            if before in roster.queues:
                roster.queues[before][1] = None
            if after in MOVES[before]:
                roster.move(1, after)
            else:
                with pytest.raises(IntegrityError, match=f"cannot go from {before.value} to {after.value}"):
                    roster.move(1, after)
            phase = after if after in MOVES[before] else before
            assert roster.sequences[1].phase is phase
            assert {each for each, queue in roster.queues.items() if 1 in queue} == {phase} & {
                *roster.queues
            }


def test_every_phase_comes_after_waiting_and_before_the_end() -> None:
    def reached(phase: Phase) -> set[Phase]:
        found, new = set[Phase](), {phase}
        while new:
            found |= new
            new = {after for before in new for after in MOVES[before]} - found
        return found

    assert reached(Phase.WAITING) == set(Phase)
    assert all(Phase.GONE in reached(phase) for phase in Phase)


def test_one_that_begins_anew_goes_before_those_that_wait() -> None:
    roster = Roster()
    for key in (1, 2, 3):
        roster.add(running(request(key)))
    for phase in (Phase.PREFILLING, Phase.RESTING, Phase.RESTARTING, Phase.WAITING):
        roster.move(2, phase)
    assert list(roster.waiting) == [2, 1, 3]
