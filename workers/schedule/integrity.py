"""Whether all books of a scheduler say the same of every sequence. Pure."""

from collections import defaultdict
from collections.abc import Collection, Mapping

from workers.budget.pages import IntegrityError
from workers.schedule.memory import PipelineMemory
from workers.schedule.parked import ParkedSessions
from workers.schedule.phase import Phase
from workers.schedule.roster import Roster
from workers.schedule.step import StepKind
from workers.schedule.steps import Steps

# The phases in which a step carries sequences.
CARRIED: Mapping[StepKind, Collection[Phase]] = {
    StepKind.PREFILL: {Phase.PREFILLING},
    StepKind.DECODE: {Phase.DECODING},
    StepKind.VERIFY: {Phase.DECODING},
    StepKind.SUSPEND: {Phase.SUSPENDING},
    StepKind.RESUME: {Phase.RESUMING},
    StepKind.PARK: {Phase.PARKING},
    StepKind.RELEASE: {Phase.RELEASING, Phase.RESTARTING},
}
# Those whose KV is, or goes, on the host; of those that memory has there, others were cancelled since.
ON_HOST = {Phase.SUSPENDING, Phase.SUSPENDED}
LEAVING = {Phase.ENDED, Phase.RELEASING, Phase.PARKING}


def check_places(roster: Roster, steps: Steps) -> None:
    """Raises IntegrityError unless each sequence is in the one place that its phase says, and no other.

    The places are the roster's queues, those that rest in a cohort, and the steps under way; only those
    that are suspended are in none.
    """
    places: defaultdict[int, list[tuple[str, Collection[Phase]]]] = defaultdict(list)
    for phase, queue in roster.queues.items():
        for key in queue:
            places[key].append((phase.value, {phase}))
    for key in roster.cohorts.resting:
        places[key].append((Phase.RESTING.value, {Phase.RESTING}))
    for step in steps:
        for key in step.sequences:
            if key in roster.sequences:  # else it is a parked session
                places[key].append((f"step {step.number}, {step.kind.value}", CARRIED[step.kind]))
    if unknown := places.keys() - roster.sequences.keys():
        raise IntegrityError(f"{sorted(unknown)} are in queues, but are not known")
    for key, sequence in roster.sequences.items():
        wanted = 0 if sequence.phase is Phase.SUSPENDED else 1
        if len(places[key]) != wanted or any(sequence.phase not in phases for _, phases in places[key]):
            names = [name for name, _ in places[key]]
            raise IntegrityError(f"sequence {key} is {sequence.phase.value}, but in the places {names}")
    roster.cohorts.check_integrity({key: sequence.phase for key, sequence in roster.sequences.items()})


def check_memory(roster: Roster, memory: PipelineMemory, parked: ParkedSessions, steps: Steps) -> None:
    """Raises IntegrityError unless memory knows who is suspended and parked, and counts all pages."""
    memory.check_integrity(roster.sequences)
    for key, sequence in roster.sequences.items():
        on_host, phase = key in memory.suspended, sequence.phase
        if on_host != (phase in ON_HOST) and not (on_host and phase in LEAVING and sequence.cancelled):
            raise IntegrityError(
                f"sequence {key} is {phase.value}, and memory has it {'' if on_host else 'not '}on the host"
            )
        if phase in (Phase.WAITING, Phase.SUSPENDED) and memory.ledger.held(key).any():
            raise IntegrityError(f"sequence {key} is {phase.value}, but holds pages")
    for session in parked:
        if session.on_host != (session.key in memory.parked and bool(memory.parked[session.key].any())):
            raise IntegrityError(f"session {session.session_id} and memory disagree where it is")
    released = (key for step in steps if step.kind is StepKind.RELEASE for key in step.sequences)
    sessions = {session.key for session in parked} | set(parked.discarded)
    sessions |= {key for key in released if key not in roster.sequences}
    if sessions != memory.parked.keys():
        raise IntegrityError(f"{sorted(sessions)} are parked, memory has {sorted(memory.parked)}")
