"""The sequences of a pipeline, the phase of each, and who of a phase goes first. Pure."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from workers.budget.pages import IntegrityError
from workers.schedule.cohorts import Cohorts
from workers.schedule.phase import MOVES, Phase
from workers.schedule.sequence import RunningSequence


class Roster:
    """All sequences, and queues of those whose phase has an order.

    Attributes:
        sequences: by key, in order of admission.
        cohorts: those that begin to decode together, and the order of those that rest.
        waiting, ready, ended: keys of those in the phase of that name, the next first.
    """

    def __init__(self) -> None:
        self.sequences: dict[int, RunningSequence] = {}
        self.cohorts = Cohorts()
        self.waiting: OrderedDict[int, None] = OrderedDict()
        self.ready: OrderedDict[int, None] = OrderedDict()
        self.ended: OrderedDict[int, None] = OrderedDict()
        self.queues: Mapping[Phase, OrderedDict[int, None]] = {
            Phase.WAITING: self.waiting,
            Phase.READY: self.ready,
            Phase.ENDED: self.ended,
        }

    def add(self, sequence: RunningSequence) -> None:
        """Takes a new sequence in, which waits behind all others."""
        key = sequence.request.sequence
        self.sequences[key] = sequence
        self.waiting[key] = None

    def move(self, key: int, phase: Phase) -> None:
        """Moves a sequence to ``phase``, behind the others there; one that waits again goes before them.

        Raises IntegrityError if that cannot follow its phase.
        """
        sequence = self.sequences[key]
        if phase not in MOVES[sequence.phase]:
            raise IntegrityError(f"sequence {key} cannot go from {sequence.phase.value} to {phase.value}")
        if sequence.phase in self.queues:
            del self.queues[sequence.phase][key]
        sequence.phase = phase
        if phase in self.queues:
            self.queues[phase][key] = None
        if phase is Phase.WAITING:
            self.waiting.move_to_end(key, last=False)

    def move_all(self, keys: Iterable[int], phase: Phase) -> None:
        """Moves each of ``keys`` to ``phase``, in order."""
        for key in keys:
            self.move(key, phase)

    def leave_cohort(self, key: int) -> None:
        """Takes a sequence out of its cohort, if it has one; those that rested for it alone are ready."""
        self.move_all(self.cohorts.remove(key), Phase.READY)

    def remove(self, key: int) -> None:
        """Forgets a sequence, which holds nothing any more."""
        self.move(key, Phase.GONE)
        del self.sequences[key]
