"""Decides what a pipeline does next. Pure: no tensors, no time, no threads."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from workers.policies.registry import recall
from workers.schedule.cohorts import Cohorts
from workers.schedule.integrity import check_memory, check_places
from workers.schedule.memory import PipelineLayout, PipelineMemory
from workers.schedule.parked import ParkedSession, ParkedSessions
from workers.schedule.phase import Phase
from workers.schedule.roster import Roster
from workers.schedule.sequence import RunningSequence, SequenceRequest
from workers.schedule.step import VERIFIED_ROWS, SequenceSpec, Step, StepKind
from workers.schedule.steps import Steps, Work, spec_of

# Prompts that begin together, in units of ``max_prefill_tokens``, at most.
COHORT_PREFILLS = 32
# Decode steps for which a prefill may hold up streams that run: less than 2, as it goes on by whole blocks,
# while nobody else waits; when others do, long enough to fill the memory that sequences leave.
QUIET_SLICE, BUSY_SLICE = 1.3, 4.0
# Steps that move or release; at most one of them is under way.
MOVING = (StepKind.SUSPEND, StepKind.RESUME, StepKind.PARK, StepKind.RELEASE)
# Sequences that no step carries, and that have pages to give up.
IDLE = (Phase.RESTING, Phase.READY)


class Scheduler:
    """Mixes prefill and decode into micro-batches and keeps every shard busy.

    At most one step that moves or releases sequences, and as many prefills and decode micro-batches each as
    there are shards, are under way. Sequences may be admitted that will not all find room at their peak:
    when the next step has none, parked sessions make room, the least recently used first, and then the
    youngest sequence. Its KV goes to the host, or is computed anew later where the host has no room. The
    oldest never does, so that all come to their end.

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
        self._cohorts = Cohorts()
        self._steps = Steps(self.sequences)

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
            self._leave_cohort(key)
            self._forget(key)
            return True
        sequence.cancelled = True
        if sequence.phase in (*IDLE, Phase.SUSPENDED):
            self._leave_cohort(key)
            self.roster.move(key, Phase.ENDED)
        return False

    def next_step(self) -> Work | None:
        """The next step to send down the pipeline and its token ids [rows]; None: wait for results."""
        if self._cohorts.closing:
            self._form_cohort()
            self._cohorts.close()
        kinds = self._steps.kinds()
        decodes = kinds[StepKind.DECODE] + kinds[StepKind.VERIFY]
        moving = any(kinds[kind] for kind in MOVING)
        if (self.roster.ended or self.parked.discarded) and not moving:
            return self._release()
        if self.roster.ready and decodes < len(self.layout.shards):
            return self._decode(moving)
        if self.memory.suspended:
            return None if moving else self._resume() or self._make_room_of_parked()
        if self.roster.waiting and kinds[StepKind.PREFILL] < len(self.layout.shards):
            return self._prefill(moving)
        return None

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
                self._moved(step.kind, *step.sequences)
            case _:
                self._grown(step)

    def end_session(self, session_id: str) -> None:
        """Gives up what the session has parked, if anything."""
        self.parked.discard(session_id)

    def expire(self, since: float) -> None:
        """Gives up sessions that were parked before the time ``since``."""
        for session in self.parked:
            if session.since < since:
                self.end_session(session.session_id)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless each sequence is in one place, and all pages are somebody's."""
        check_places(self.roster, self._cohorts, self._steps)
        check_memory(self.roster, self.memory, self.parked, self._steps)

    def _decode(self, moving: bool) -> Work | None:
        """A decode or a verification of those that are ready; or what makes room for it."""
        keys = self._decode_group()
        counts = self._counts(keys)
        if self.memory.hold(keys, self._fed(keys), counts):
            self.roster.move_all(keys, Phase.DECODING)
            return self._steps.decode(keys, counts)
        return None if moving else self._make_room()

    def _grown(self, step: Step) -> None:
        ended = [key for key in step.sequences if self.sequences[key].ended]
        going_on = [key for key in step.sequences if not self.sequences[key].ended]
        self.roster.move_all(ended, Phase.ENDED)
        if going_on:
            self.memory.hold(going_on, self._fed(going_on))
        if step.kind is StepKind.PREFILL:
            self.roster.move_all(going_on, Phase.RESTING)
            self.roster.move_all(self._cohorts.prefilled(step.sequences, going_on), Phase.READY)
            return
        for key in ended:
            self._leave_cohort(key)
        for key in going_on:
            self.roster.move(key, Phase.RESTING if self._cohorts.rest(key) else Phase.READY)

    def _park(self, key: int, whole: bool) -> None:
        """Parks the session of a sequence that has ended; ``whole``: nothing of it was dropped."""
        sequence = self.sequences[key]
        request = sequence.request
        self.roster.remove(key)
        self.memory.park(key)
        session = ParkedSession(
            key=key,
            session_id=request.session_id,
            ids=(*request.prompt_ids, *sequence.output_ids[: sequence.fed]),
            prompt_tokens=len(request.prompt_ids),
            compression=request.compression,
            whole=whole and sequence.whole,
            since=sequence.token_times[-1],
        )
        if sequence.cancelled:
            self.parked.discarded.append(key)
        else:
            self.parked.add(session)

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

    def _moved(self, kind: StepKind, key: int) -> None:
        if kind is StepKind.SUSPEND:
            self.memory.hold_nothing(key)
        if key in self.memory.parked:
            return
        moved = Phase.SUSPENDED if kind is StepKind.SUSPEND else Phase.READY
        self.roster.move(key, Phase.ENDED if self.sequences[key].cancelled else moved)

    def _fed(self, keys: Sequence[int]) -> list[int]:
        return [self.sequences[key].fed for key in keys]

    def _forget(self, key: int) -> None:
        self.memory.remove(key)
        self.roster.remove(key)

    def _leave_cohort(self, key: int) -> None:
        """Takes a sequence out of its cohort, if it has one, and lets those decode that rested for it."""
        self.roster.move_all(self._cohorts.remove(key), Phase.READY)

    def _make_room(self) -> Work | None:
        """Lets a parked session go, or preempts the youngest idle sequence unless it is the only one."""
        if (work := self._make_room_of_parked()) is not None:
            return work
        idle = [key for key, sequence in self.sequences.items() if sequence.phase in IDLE]
        if len(idle) < 2:
            return None
        key = idle[-1]
        suspends = self.memory.suspend(key)
        on_host = self.parked.oldest(on_host=True)
        if on_host and not suspends:
            return self._give_up(on_host)
        self._leave_cohort(key)
        self.sequences[key].preemptions += 1
        self.sequences[key].drafts = []
        if not suspends:
            self.roster.move(key, Phase.RESTARTING)
            return self._steps.without_rows(StepKind.RELEASE, [key])
        self.roster.move(key, Phase.SUSPENDING)
        return self._steps.without_rows(StepKind.SUSPEND, [key])

    def _make_room_of_parked(self, but: ParkedSession | None = None) -> Work | None:
        """Moves the least recently used session to the host, or gives one up where that is full."""
        session = self.parked.oldest(on_host=False, but=but)
        if session is None:
            return None
        if self.memory.park_on_host(session.key):
            session.on_host = True
            return self._steps.without_rows(StepKind.SUSPEND, [session.key])
        return self._give_up(self.parked.oldest(on_host=True, but=but) or session)

    def _give_up(self, session: ParkedSession) -> Work:
        self.end_session(session.session_id)
        return self._release()

    def _resume(self) -> Work | None:
        """Brings the oldest suspended sequence back, if there is room again."""
        suspended = (key for key, each in self.sequences.items() if each.phase is Phase.SUSPENDED)
        key = next(suspended, None)
        if key is None or not self.memory.resume(self.sequences[key]):
            return None
        self.roster.move(key, Phase.RESUMING)
        return self._steps.without_rows(StepKind.RESUME, [key])

    def _form_cohort(self) -> None:
        """Makes those a cohort that wait now, or lets them join it, as far as COHORT_PREFILLS go."""
        keys: list[int] = []
        there = [self.sequences[key] for key in self._cohorts.open if key in self.sequences]
        room = COHORT_PREFILLS * self.layout.max_prefill_tokens
        room -= sum(len(sequence.request.prompt_ids) for sequence in there)
        for key in self.roster.waiting:
            if key in self._cohorts:
                continue
            room -= len(self._request(key).prompt_ids)
            if room < 0 and (keys or there):
                break
            keys.append(key)
        self._cohorts.form(keys)

    def _release(self) -> Work:
        """Frees what has ended and what is discarded; or parks what has ended, if that is all."""
        ended = list(self.roster.ended)
        if not self.parked.discarded and all(map(self._parks, ended)):
            self.roster.move_all(ended, Phase.PARKING)
            return self._steps.without_rows(StepKind.PARK, ended)
        leaving = [key for key in ended if not self._parks(key)]
        self.roster.move_all(leaving, Phase.RELEASING)
        leaving += self.parked.discarded
        self.parked.discarded.clear()
        return self._steps.without_rows(StepKind.RELEASE, leaving)

    def _parks(self, key: int) -> bool:
        sequence = self.sequences[key]
        ended_well = sequence.finish_reason is not None and not sequence.cancelled
        return ended_well and bool(sequence.request.session_id) and self.layout.max_sessions > 0

    def _prefill(self, moving: bool) -> Work | None:
        """Prefills for as many prompts, in order, as a micro-batch and the free pages have room for."""
        first = next(iter(self.roster.waiting))
        if first not in self._cohorts:
            self._form_cohort()
        if first not in self._cohorts:  # the open one is full
            self._cohorts.close()
            self._form_cohort()
        if self.memory.host_is_overfull:
            on_host = self.parked.oldest(on_host=True) or self.parked.oldest(on_host=False)
            return None if moving or on_host is None else self._give_up(on_host)
        session = self._session_of(first)
        if session and (reused := session.reusable(self._request(first))):
            return None if moving else self._go_on(first, session, reused)
        keys: list[int] = []
        tokens = 0
        # Smaller ones with more shards, so that all of these have something to do soon.
        limit = self.layout.max_prefill_tokens // len(self.layout.shards)
        for key in self.roster.waiting:
            tokens += len(self._request(key).prompt_ids)
            if keys and (tokens > limit or not self._cohorts.same(keys[0], key) or self._session_of(key)):
                break
            if not self.memory.hold([key], [0]):
                break
            keys.append(key)
        if not keys:
            room = None if moving else self._make_room_of_parked()
            return room or self._wait_for_room()
        return self._begin([spec_of(self._request(key)) for key in keys])

    def _session_of(self, key: int) -> ParkedSession | None:
        return self.parked.get(self._request(key).session_id)

    def _go_on(self, key: int, session: ParkedSession, reused: int) -> Work | None:
        """Lets the first that waits go on with what its session has left; brings that back before."""
        if session.on_host and self.memory.bring_back(session.key):
            session.on_host = False
            return self._steps.without_rows(StepKind.RESUME, [session.key])
        if session.on_host or not self.memory.go_on(session.key, session.generated, key):
            room = self._make_room_of_parked(but=session)
            if room is None and len(self.roster.waiting) == len(
                self.sequences
            ):  # nobody else will make any
                return self._give_up(session)
            return room or self._wait_for_room()
        self.parked.remove(session.session_id)
        sequence = self.sequences[key]
        sequence.reused, sequence.whole = reused, session.whole
        recalls = recall(session.compression) != "off" or reused < session.prompt_tokens
        spec = replace(spec_of(sequence.request), continues=session.key, reused=reused, recall=recalls)
        return self._begin([spec])

    def _begin(self, specs: list[SequenceSpec]) -> Work:
        """Sends the first that wait on their way."""
        self.roster.move_all([spec.sequence for spec in specs], Phase.PREFILLING)
        return self._steps.prefill(specs, BUSY_SLICE if self.queued or self.roster.waiting else QUIET_SLICE)

    def _wait_for_room(self) -> Work | None:
        """Wakes those that wait for prefills for which there is no room, as their end makes it."""
        for key in self.roster.waiting:
            self._leave_cohort(key)
        return self.next_step() if self.roster.ready and not len(self._steps) else None

    def _decode_group(self) -> list[int]:
        """Those that decode, or verify, next: of all that do, an equal part for each shard."""
        decoding = sum(sequence.reached > 0 for sequence in self.sequences.values()) - len(
            self.memory.suspended
        )
        group = -(-decoding // len(self.layout.shards))
        if not self.sequences[next(iter(self.roster.ready))].verifies:
            return [key for key in self.roster.ready if not self.sequences[key].verifies][:group]
        # All that have drafts, so that they stay in step: one verification costs little more for many.
        keys = [
            key for key in self.roster.ready if self.sequences[key].verifies or self.sequences[key].drafts
        ]
        rows = itertools.accumulate(1 + len(self.sequences[key].ahead_ids) for key in keys[:group])
        return [key for key, total in zip(keys, rows, strict=False) if total <= VERIFIED_ROWS]

    def _counts(self, keys: Sequence[int]) -> list[int]:
        """Tokens that a decode step feeds of each: the newest, and what is known behind it."""
        counts, room = [], max(0, VERIFIED_ROWS - len(keys))
        for key in keys:
            ahead = len(self.sequences[key].known_ahead(room))
            counts.append(1 + ahead)
            room -= ahead
        return counts

    def _request(self, key: int) -> SequenceRequest:
        return self.sequences[key].request
