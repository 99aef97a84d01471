"""Decides what a pipeline does next. Pure: no tensors, no time, no threads."""

from collections.abc import Sequence
from dataclasses import replace

from workers.policies.registry import recall
from workers.schedule.groups import Groups
from workers.schedule.integrity import check_memory, check_places
from workers.schedule.memory import PipelineLayout, PipelineMemory
from workers.schedule.parked import ParkedSession, ParkedSessions
from workers.schedule.phase import Phase
from workers.schedule.room import IDLE, MOVING, Room
from workers.schedule.roster import Roster
from workers.schedule.sequence import RunningSequence
from workers.schedule.step import SequenceSpec, Step, StepKind
from workers.schedule.steps import Steps, Work, spec_of


def steps_at_most(shards: int) -> int:
    """Steps under way at once, at most: a prefill and a decode for each shard, and one that moves."""
    return 2 * shards + 1


class Scheduler:
    """Mixes prefill and decode into micro-batches and keeps every shard busy.

    At most one step that moves or releases sequences, and as many prefills and decode micro-batches each as
    there are shards, are under way: ``steps_at_most``. Sequences may be admitted that will not all find
    room at their peak: when the next step has none, parked sessions make room, the least recently used
    first, and then the youngest sequence. Its KV goes to the host, or is computed anew later where the host
    has no room. The oldest never does, so that all come to their end.

    Attributes:
        roster: who is in which phase; ``sequences`` are all of them by key.
        queued: requests that wait outside for room.
        parked: sessions between two turns.
    """

    def __init__(self, layout: PipelineLayout) -> None:
        self.layout = layout
        self.memory = PipelineMemory(layout)
        self.roster = Roster()
        self.sequences = self.roster.sequences
        self.queued = 0
        self.parked = ParkedSessions(layout.max_sessions)
        self._steps = Steps(self.sequences, layout.context)
        self._groups = Groups(layout, self.memory, self.parked, self.roster)
        self._room = Room(self.memory, self.parked, self.roster, self._steps)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done: no sequence is here, and no session to be given up."""
        return not (self.sequences or self.parked.discarded or len(self._steps))

    @property
    def steps_under_way(self) -> int:
        return len(self._steps)

    def admit(self, sequence: RunningSequence) -> bool:
        """Queues the prefill of ``sequence``; False if there are too many, or no room for it alone."""
        if not self.memory.add(sequence):
            return False
        self.roster.add(sequence)
        return True

    def cancel(self, key: int) -> bool:
        """Ends a sequence as soon as no step carries it.

        Returns whether it is gone already, as it had not begun; else its release will tell.
        """
        sequence = self.sequences.get(key)
        if sequence is None:
            return False
        if sequence.phase is Phase.WAITING:
            self.roster.leave_cohort(key)
            self._forget(key)
            return True
        sequence.cancelled = True
        if sequence.phase in (*IDLE, Phase.SUSPENDED):
            self.roster.leave_cohort(key)
            self.roster.move(key, Phase.ENDED)
        return False

    def next_step(self) -> Work | None:
        """The next step to send down the pipeline and its token ids [rows]; None: wait for results."""
        if self.roster.cohorts.closing:
            self._groups.form_cohort()
            self.roster.cohorts.close()
        kinds = self._steps.kinds()
        decodes = kinds[StepKind.DECODE] + kinds[StepKind.VERIFY]
        moving = any(kinds[kind] for kind in MOVING)
        if not moving and (work := self._room.release()):
            return work
        if self.roster.ready and decodes < len(self.layout.shards):
            return self._decode(moving)
        work = None
        if self.memory.suspended:
            if moving:
                return None
            if not (work := self._room.resume() or self._room.make_of_parked()):
                self._wake_resting()
        elif self.roster.waiting and kinds[StepKind.PREFILL] < len(self.layout.shards):
            work = self._prefill(moving)
        # Where nobody finds room, some that rested may have been woken.
        wakes = not work and self.roster.ready and not len(self._steps)
        return self._decode(moving) if wakes else work

    def finish_step(self, step: Step) -> None:
        """Takes note that ``step`` has passed all shards; outputs have been accepted before."""
        self._steps.done(step)
        match step.kind:
            case StepKind.RELEASE:
                for key in step.sequences:
                    self._released(key)
            case StepKind.PARK:
                for key, *reports in zip(step.sequences, *step.released, strict=True):
                    self._park(key, not any(report.dropped_bytes for report in reports))
            case StepKind.SUSPEND | StepKind.RESUME:
                self._room.moved(step.kind, *step.sequences)
            case _:
                self._grown(step)

    def end_session(self, session_id: str) -> None:
        """Gives up what the session has parked, and what its turns that are here leave, if anything."""
        self.parked.discard(session_id)
        for sequence in self.sequences.values():
            sequence.session_ended |= sequence.request.session_id == session_id

    def expire(self, since: float) -> None:
        """Gives up sessions that were parked before the time ``since``."""
        for session in self.parked:
            if session.since < since:
                self.parked.discard(session.session_id)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless each sequence is in one place, and all pages are somebody's."""
        check_places(self.roster, self._steps)
        check_memory(self.roster, self.memory, self.parked, self._steps)

    def _decode(self, moving: bool) -> Work | None:
        """A decode or a verification of those that are ready; or what makes room for it."""
        keys = self._groups.decode()
        counts = self._groups.counts(keys)
        if self.memory.hold(keys, self._fed(keys), counts):
            self.roster.move_all(keys, Phase.DECODING)
            return self._steps.decode(keys, counts)
        return None if moving else self._room.make()

    def _grown(self, step: Step) -> None:
        ended = [key for key in step.sequences if self.sequences[key].ended]
        going_on = [key for key in step.sequences if not self.sequences[key].ended]
        self.roster.move_all(ended, Phase.ENDED)
        if going_on:
            self.memory.hold(going_on, self._fed(going_on))
        if step.kind is StepKind.PREFILL:
            self.roster.move_all(going_on, Phase.RESTING)
            self.roster.move_all(self.roster.cohorts.prefilled(step.sequences, going_on), Phase.READY)
            return
        for key in ended:
            self.roster.leave_cohort(key)
        for key in going_on:
            self.roster.move(key, Phase.RESTING if self.roster.cohorts.rest(key) else Phase.READY)

    def _park(self, key: int, whole: bool) -> None:
        sequence, session_id = self.sequences[key], self.sequences[key].session_id
        self.roster.remove(key)
        on_host = self.memory.park(key)
        # A turn that was broken off takes no other's place.
        if session_id and not (sequence.cancelled and self.parked.get(session_id)):
            self.parked.add(ParkedSession.of(sequence, whole, on_host))
        else:
            self.parked.discarded.append(key)

    def _released(self, key: int) -> None:
        if key in self.memory.parked:
            self.memory.remove(key)
            return
        sequence = self.sequences[key]
        if sequence.phase is not Phase.RESTARTING or sequence.cancelled:
            self._forget(key)
            return
        self.memory.hold_nothing(key)
        sequence.reached = 0
        self.roster.move(key, Phase.WAITING)

    def _fed(self, keys: Sequence[int]) -> list[int]:
        return [self.sequences[key].fed for key in keys]

    def _forget(self, key: int) -> None:
        self.memory.remove(key)
        self.roster.remove(key)

    def _prefill(self, moving: bool) -> Work | None:
        """Prefills as many prompts as have room; or what makes room for them, or None."""
        first = next(iter(self.roster.waiting))
        if first not in self.roster.cohorts:
            self._groups.form_cohort()
        if first not in self.roster.cohorts:  # the open one is full
            self.roster.cohorts.close()
            self._groups.form_cohort()
        if self.memory.host_is_overfull:
            return None if moving else self._room.make_on_host()
        session = self._session_of(first)
        if session and (reused := self._reusable(session, self.sequences[first])):
            return None if moving else self._go_on(first, session, reused)
        if keys := self._groups.prefill():
            return self._begin([spec_of(self.sequences[key]) for key in keys])
        if not moving and (work := self._room.make_of_parked()):
            return work
        self._wake_resting()
        return None

    def _session_of(self, key: int) -> ParkedSession | None:
        return self.parked.get(self.sequences[key].session_id)

    def _reusable(self, session: ParkedSession, sequence: RunningSequence) -> int:
        """Tokens of ``session`` that a turn can go on with: none that it would rotate otherwise.

        And none where these and what is new would be more than the context.
        """
        alike, tokens = self.layout.frequencies_length, len(sequence.request.prompt_ids)
        if alike(session.length) != alike(sequence.length):
            return 0
        reused = session.reusable(sequence.request)
        there = sequence.plan.held if reused >= session.prompt_tokens else reused
        return reused if min(there, reused) + tokens - reused <= self.layout.context else 0

    def _go_on(self, key: int, session: ParkedSession, reused: int) -> Work | None:
        """Lets the first that waits go on with what its session has left; brings that back before.

        Or prefills it as a whole, where that is the shorter way.
        """
        sequence = self.sequences[key]
        if not session.lifting_pays(sequence.plan, self.layout.tuning.lifted_row):
            sequence.recomputed_rows = session.recomputed_rows + sum(sequence.plan.kept)
            return self._room.give_up(session)
        if session.on_host and (work := self._room.bring_back(session)):
            return work
        if session.on_host or not self.memory.go_on(session.key, session.generated, key):
            if work := self._room.make_of_parked(spared=session):
                return work
            if len(self.roster.waiting) == len(self.sequences):  # nobody else will make any
                return self._room.give_up(session)
            self._wake_resting()
            return None
        self.parked.remove(session.session_id)
        sequence.reused, sequence.whole = reused, session.whole
        recalls = recall(session.compression) != "off" or reused < session.prompt_tokens
        spec = replace(spec_of(sequence), continues=session.key, reused=reused, recall=recalls)
        return self._begin([spec])

    def _begin(self, specs: list[SequenceSpec]) -> Work:
        """Sends the first that wait on their way."""
        self.roster.move_all([spec.sequence for spec in specs], Phase.PREFILLING)
        tuning, others_wait = self.layout.tuning, self.queued or self.roster.waiting
        return self._steps.prefill(specs, tuning.busy_slice if others_wait else tuning.quiet_slice)

    def _wake_resting(self) -> None:
        """Lets those decode that rest for prefills without room: only their end makes some."""
        for key in self.roster.waiting:
            self.roster.leave_cohort(key)
