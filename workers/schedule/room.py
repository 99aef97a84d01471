"""Who makes room for those that run, and who comes back when there is room again. Pure."""

from workers.schedule.memory import PipelineMemory
from workers.schedule.parked import ParkedSession, ParkedSessions
from workers.schedule.phase import Phase
from workers.schedule.roster import Roster
from workers.schedule.step import StepKind
from workers.schedule.steps import Steps, Work

# Its steps; at most one of them is under way.
MOVING = (StepKind.SUSPEND, StepKind.RESUME, StepKind.PARK, StepKind.RELEASE)
# Sequences that no step carries, and that have pages to give up.
IDLE = (Phase.RESTING, Phase.READY)


class Room:
    """Makes the steps that move, park or release; for when no such step is under way.

    Parked sessions make room first, the least recently used before the others: they go to the host, and
    are given up where that is full. Then the youngest sequence does.
    """

    def __init__(
        self, memory: PipelineMemory, parked: ParkedSessions, roster: Roster, steps: Steps
    ) -> None:
        self._memory, self._parked, self._roster, self._steps = memory, parked, roster, steps

    def release(self) -> Work | None:
        """Frees what has ended and what is given up; or parks what has ended, if that is all; or None."""
        ended, discarded = list(self._roster.ended), self._parked.discarded
        if not (ended or discarded):
            return None
        parks = self._parked.limit > 0
        leaving = [key for key in ended if not (parks and self._roster.sequences[key].session_id)]
        if not (leaving or discarded):
            self._roster.move_all(ended, Phase.PARKING)
            return self._steps.without_rows(StepKind.PARK, ended)
        self._roster.move_all(leaving, Phase.RELEASING)
        leaving += discarded
        discarded.clear()
        return self._steps.without_rows(StepKind.RELEASE, leaving)

    def make(self) -> Work | None:
        """Lets a parked session go, or preempts the youngest idle sequence unless it is the only one."""
        if (work := self.make_of_parked()) is not None:
            return work
        idle = [key for key, sequence in self._roster.sequences.items() if sequence.phase in IDLE]
        if len(idle) < 2:
            return None
        key = idle[-1]
        suspends = self._memory.suspend(key)
        on_host = self._parked.oldest(on_host=True)
        if on_host and not suspends:
            return self.give_up(on_host)
        self._roster.leave_cohort(key)
        sequence = self._roster.sequences[key]
        sequence.preemptions += 1
        sequence.drafts = []
        self._roster.move(key, Phase.SUSPENDING if suspends else Phase.RESTARTING)
        return self._steps.without_rows(StepKind.SUSPEND if suspends else StepKind.RELEASE, [key])

    def make_of_parked(self, spared: ParkedSession | None = None) -> Work | None:
        """Moves the least recently used session to the host, or gives one up where that is full.

        Never ``spared``; None if there is no other on the device.
        """
        session = self._parked.oldest(on_host=False, spared=spared)
        if session is None:
            return None
        if self._memory.park_on_host(session.key):
            session.on_host = True
            return self._steps.without_rows(StepKind.SUSPEND, [session.key])
        return self.give_up(self._parked.oldest(on_host=True, spared=spared) or session)

    def make_on_host(self) -> Work | None:
        """Gives up the session that was parked on the host the longest, or any; None if there is none."""
        session = self._parked.oldest(on_host=True) or self._parked.oldest(on_host=False)
        return None if session is None else self.give_up(session)

    def give_up(self, session: ParkedSession) -> Work | None:
        """Frees what a session has parked."""
        self._parked.discard(session.session_id)
        return self.release()

    def resume(self) -> Work | None:
        """Brings the oldest suspended sequence back, if there is room again."""
        sequences = self._roster.sequences.items()
        key = next((key for key, sequence in sequences if sequence.phase is Phase.SUSPENDED), None)
        if key is None or not self._memory.resume(self._roster.sequences[key]):
            return None
        self._roster.move(key, Phase.RESUMING)
        return self._steps.without_rows(StepKind.RESUME, [key])

    def bring_back(self, session: ParkedSession) -> Work | None:
        """Brings a session back from the host, if there is room for it."""
        if not self._memory.bring_back(session.key):
            return None
        session.on_host = False
        return self._steps.without_rows(StepKind.RESUME, [session.key])

    def moved(self, kind: StepKind, key: int) -> None:
        """Takes note that a sequence or session has reached the host, or come back."""
        if kind is StepKind.SUSPEND:
            self._memory.hold_nothing(key)
        if key in self._memory.parked:
            return
        phase = Phase.SUSPENDED if kind is StepKind.SUSPEND else Phase.READY
        self._roster.move(key, Phase.ENDED if self._roster.sequences[key].cancelled else phase)
