"""Who waits, who runs next and where."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from cluster.admit.ledger import PipelineLedger
from cluster.admit.lengths import OutputLengths
from cluster.admit.pace import Pace
from cluster.admit.placement import Kept, Look, Placement
from cluster.admit.queue import Queue, Waiting
from cluster.admit.request import ValidatedRequest
from cluster.admit.sessions import Sessions
from cluster.admit.tuning import AdmitTuning
from cluster.autoscale import pipelines_filled
from pyramidserve.errors import OverloadedError, RequestTimeoutError, RequestTooLargeError

# How often the queue is gone through for those that will miss their deadline, in seconds.
LATE_INTERVAL = 0.1


class Dated(Waiting, Protocol):
    """What waits, hashed by identity; ``deadline`` is in seconds as ``arrived``, or infinite."""

    @property
    def deadline(self) -> float: ...


Item = TypeVar("Item", bound=Dated)


@dataclass(frozen=True)
class _Miss:
    """Since when something has found no room, and the pipelines' gains at its last try, if that counts."""

    since: float
    gains: int | None


@dataclass(frozen=True)
class Admitted(Generic[Item]):
    """A decision: ``item`` runs as ``sequence_id`` on the pipeline whose ledger now counts on it."""

    sequence_id: int
    item: Item
    pipeline_id: str
    expected_tokens: int


class Admission(Generic[Item]):
    """A bounded queue that fills free pages; see ``Queue`` for its order.

    Attributes:
        limit: the most that may wait. On top come requeued ones, and those of a tenant that has not its
            share of the limit: others may have all of it while nobody else wants it, but lock nobody out.
        decisions: how many decisions were made, by what was decided or the error's reason.
    """

    def __init__(
        self,
        limit: int,
        weights: Mapping[str, float],
        clock: Callable[[], float],
        tuning: AdmitTuning = AdmitTuning(),
    ) -> None:
        """``weights``: of the tenants."""
        self.limit = limit
        self.decisions: Counter[str] = Counter()
        self._clock, self._tuning = clock, tuning
        self._queue: Queue[Item] = Queue(weights)
        self._missed: dict[Item, _Miss] = {}
        self._kept: tuple[Item, Kept] | None = None
        self._late_looked = -math.inf
        self._sequence_ids = itertools.count(1)
        self._lengths = OutputLengths(tuning.length_share)
        self._pace = Pace(clock)

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, item: Item) -> bool:
        return item in self._queue

    def enqueue(self, item: Item, ledgers: Iterable[PipelineLedger]) -> None:
        """Puts ``item`` into the queue.

        Raises:
            RequestTooLargeError: none of ``ledgers``, the attached pipelines, could ever hold it.
            OverloadedError: the queue is full, and its tenant has its share of it.
            RequestTimeoutError: it could not end before its deadline.
        """
        late = self._too_late(item, self._queue.before(item.tenant))
        error = too_large(item.request, ledgers) or late or self._full(item.tenant)
        if error:
            self.decisions[error.reason] += 1
            raise error
        self._queue.add(item)

    def requeue(self, item: Item) -> None:
        """Puts ``item``, which a pipeline had no room for or did not finish, back where it was."""
        self.decisions["requeued"] += 1
        self._queue.add(item)

    def remove(self, item: Item) -> None:
        """Takes ``item`` out of the queue if it is there."""
        self._queue.remove(item)
        self._forget_miss(item)

    def choose(self, placement: Placement, sessions: Sessions) -> list[Admitted[Item]]:
        """Takes from the queue what fits the pipelines until its end, and adds it to their ledgers.

        In the queue's order. Others may overtake one that does not fit: for a while, and then as long as
        they leave it its room. A request goes to the pipeline of its session if it fits there, else to the
        one with the most room.
        """
        admitted = []
        look, misses = Look(), 0
        for item in self._in_order() if len(placement) else ():
            found = self._find(item, placement, sessions, look)
            if found is not None:
                admitted.append(found)
                continue
            misses += 1
            if look.kept is None and self._clock() - self._missed[item].since > self._tuning.patience:
                look.kept = self._keep(item, placement)
            if misses > self._tuning.lookahead:
                break
        for each in admitted:
            self._queue.serve(each.item)
        self.decisions["admitted"] += len(admitted)
        return admitted

    def _in_order(self) -> Iterator[Item]:
        """The queue, before it the one for which room is kept: else others might keep it for ever."""
        first = self._kept[0] if self._kept else None
        if first is not None:
            yield first
        yield from (item for item in self._queue if item is not first)

    def _find(
        self, item: Item, placement: Placement, sessions: Sessions, look: Look
    ) -> Admitted[Item] | None:
        """Adds ``item`` to the ledger of a pipeline with room; None, which is noted, if there is none."""
        request, missed = item.request, self._missed.get(item)
        if missed and missed.gains == placement.gains:
            return None
        expected = self._lengths.expected(request)
        gains = missed.gains if missed else None
        ledger = placement.find(request, expected, gains, sessions.pipeline(request.session_id), look)
        if ledger is None:
            self._missed[item] = _Miss(missed.since if missed else self._clock(), placement.gains)
            return None
        self._forget_miss(item)
        sequence_id = next(self._sequence_ids)
        ledger.add(sequence_id, ledger.growth(request, expected))
        placement.took(ledger)
        return Admitted(sequence_id, item, ledger.pipeline_id, expected)

    def _keep(self, item: Item, placement: Placement) -> Kept | None:
        """The room that is kept for ``item``, from now on if there is none yet."""
        if self._kept and self._kept[0] is item and self._kept[1].pipeline_id in placement:
            return self._kept[1]
        kept = placement.keep(item.request, self._lengths.expected(item.request))
        self._kept = (item, kept) if kept else None
        return kept

    def _forget_miss(self, item: Item) -> None:
        """Notes that ``item`` waits no longer, and keeps no room any more."""
        self._missed.pop(item, None)
        if self._kept and self._kept[0] is item:
            self._kept = None
            self._missed = {each: replace(missed, gains=None) for each, missed in self._missed.items()}

    def demand(self, ledgers: Sequence[PipelineLedger]) -> float:
        """How many pipelines those of ``ledgers`` and all that waits would fill; 0 without ledgers."""
        if not ledgers:
            return 0.0
        running = [ledger.share(ledger.peak()) for ledger in ledgers]
        usual, lengths = ledgers[0], self._lengths
        waiting = [usual.growth(each.request, lengths.expected(each.request)) for each in self._queue]
        return pipelines_filled(running, [usual.share(more.expected) for more in waiting])

    def take_too_late(self) -> list[tuple[Item, RequestTimeoutError]]:
        """Takes from the queue what could not end before its deadline even if it ran now.

        Nothing if that was looked for within LATE_INTERVAL.
        """
        now = self._clock()
        if now < self._late_looked + LATE_INTERVAL:
            return []
        self._late_looked = now
        late = [(item, error) for item in self._queue if (error := self._too_late(item, 0))]
        for item, _ in late:
            self.remove(item)
        return late

    def take_too_large(
        self, ledgers: Collection[PipelineLedger]
    ) -> list[tuple[Item, RequestTooLargeError]]:
        """Takes from the queue what none of ``ledgers`` could ever hold, with the reason."""
        taken = [(item, error) for item in self._queue if (error := too_large(item.request, ledgers))]
        for item, _ in taken:
            self.remove(item)
        return taken

    def count_finished(self, request: ValidatedRequest, output_tokens: int, token_seconds: float) -> None:
        """Notes that ``request`` has finished, now, after ``token_seconds`` a token; 0 if there was one."""
        self.decisions["finished"] += 1
        self._lengths.count(request, output_tokens)
        self._pace.count(token_seconds)

    def _full(self, tenant: str) -> OverloadedError | None:
        waiting, share = self._queue.waiting(tenant), self._queue.share(tenant, self.limit)
        if len(self._queue) < self.limit or waiting < share:
            return None
        whose = f", {waiting} of them of tenant {tenant!r}, whose share is {share}" if tenant else ""
        return OverloadedError(
            f"{len(self._queue)} requests are waiting and {self.limit} may{whose}; "
            "try again after the retry delay",
            retry_delay=self._pace.retry_delay(len(self._queue)),
        )

    def _too_late(self, item: Item, waiting: int) -> RequestTimeoutError | None:
        """Why an item would miss its deadline even if only so many others come before it; None if not."""
        if math.isinf(item.deadline):
            return None
        return self._pace.too_late(item.deadline, self._lengths.expected(item.request), waiting)


def too_large(request: ValidatedRequest, ledgers: Iterable[PipelineLedger]) -> RequestTooLargeError | None:
    """Why none of ``ledgers`` could ever hold ``request``; None if one could, or there is none."""
    errors = []
    for ledger in ledgers:
        error = ledger.too_large(request)
        if error is None:
            return None
        errors.append(error)
    return errors[0] if errors else None
