"""Who waits, who runs next and where."""

import itertools
from bisect import insort_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cluster.ledger import PipelineLedger
from cluster.requests import ValidatedRequest
from cluster.sessions import Sessions
from pyramidserve.errors import OverloadedError, RequestTooLargeError

COMPLETIONS = 64
UNKNOWN_RETRY_DELAY = 1.0
RETRY_DELAY_RANGE = (0.1, 30.0)


class Waiting(Protocol):
    """What stands in the queue; ``arrived`` is in seconds and orders it."""

    @property
    def request(self) -> ValidatedRequest: ...

    @property
    def arrived(self) -> float: ...


Item = TypeVar("Item", bound=Waiting)


@dataclass(frozen=True)
class Admitted(Generic[Item]):
    """A decision: ``item`` runs as ``sequence_id`` on the pipeline whose ledger holds its pages."""

    sequence_id: int
    item: Item
    pipeline_id: str


class Admission(Generic[Item]):
    """A bounded queue, first come first served, that fills free pages.

    Attributes:
        limit: the most that may wait; requeued ones come on top.
        decisions: how many decisions were made, by what was decided or the error's reason.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.decisions: Counter[str] = Counter()
        self._clock = clock
        self._queue: list[Item] = []
        self._sequence_ids = itertools.count(1)
        self._completions: deque[float] = deque(maxlen=COMPLETIONS)

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, item: Item) -> bool:
        return any(each is item for each in self._queue)

    def enqueue(self, item: Item, ledgers: Sequence[PipelineLedger]) -> None:
        """Puts ``item`` at the end of the queue.

        Raises:
            RequestTooLargeError: none of ``ledgers``, the attached pipelines, could ever hold it.
            OverloadedError: the queue is full.
        """
        error = too_large(item.request, ledgers)
        if error:
            self.decisions[error.reason] += 1
            raise error
        if len(self._queue) >= self.limit:
            self.decisions[OverloadedError.reason] += 1
            raise OverloadedError(
                f"{len(self._queue)} requests are waiting and {self.limit} may; "
                "try again after the retry delay",
                retry_delay=self.retry_delay(),
            )
        self._queue.append(item)

    def requeue(self, item: Item) -> None:
        """Puts ``item``, which a pipeline had no room for, back where it was: in front."""
        self.decisions["requeued"] += 1
        insort_left(self._queue, item, key=lambda each: each.arrived)

    def remove(self, item: Item) -> None:
        """Takes ``item`` out of the queue if it is there."""
        self._queue = [each for each in self._queue if each is not item]

    def choose(self, ledgers: Sequence[PipelineLedger], sessions: Sessions) -> list[Admitted[Item]]:
        """Takes from the queue, in order, what fits ``ledgers`` now, and reserves its pages.

        The first that does not fit holds the rest back. A request goes to the pipeline of its
        session if it fits there, else to the one with the most free pages.
        """
        admitted = []
        while self._queue:
            item = self._queue[0]
            ledger = _place(item.request, ledgers, sessions)
            if ledger is None:
                break
            del self._queue[0]
            sequence_id = next(self._sequence_ids)
            ledger.reserve(sequence_id, ledger.needs(item.request))
            admitted.append(Admitted(sequence_id, item, ledger.pipeline_id))
            self.decisions["admitted"] += 1
        return admitted

    def take_too_large(self, ledgers: Sequence[PipelineLedger]) -> list[tuple[Item, RequestTooLargeError]]:
        """Takes from the queue what none of ``ledgers`` could ever hold, with the reason."""
        taken = [
            (item, error) for item in self._queue if (error := too_large(item.request, ledgers)) is not None
        ]
        for item, _ in taken:
            self.remove(item)
        return taken

    def count_finished(self) -> None:
        """Notes that a request has finished, now."""
        self.decisions["finished"] += 1
        self._completions.append(self._clock())

    def retry_delay(self) -> float:
        """Seconds in which the queue drains at the rate of the last completions."""
        if len(self._completions) < 2:
            return UNKNOWN_RETRY_DELAY
        seconds_each = (self._clock() - self._completions[0]) / (len(self._completions) - 1)
        least, most = RETRY_DELAY_RANGE
        return min(max(len(self._queue) * seconds_each, least), most)


def too_large(request: ValidatedRequest, ledgers: Sequence[PipelineLedger]) -> RequestTooLargeError | None:
    """Why none of ``ledgers`` could ever hold ``request``; None if one could, or there is none."""
    errors = []
    for ledger in ledgers:
        error = ledger.too_large(request)
        if error is None:
            return None
        errors.append(error)
    return errors[0] if errors else None


def _place(
    request: ValidatedRequest, ledgers: Sequence[PipelineLedger], sessions: Sessions
) -> PipelineLedger | None:
    home = sessions.pipeline(request.session_id)
    fitting = [ledger for ledger in ledgers if ledger.fits(ledger.needs(request))]
    return max(
        fitting,
        key=lambda ledger: (ledger.pipeline_id == home, sum(ledger.free)),
        default=None,
    )
