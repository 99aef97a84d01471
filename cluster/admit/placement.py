"""Which pipeline has room: found in a time that grows with the logarithm of how many there are."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Set
from dataclasses import dataclass
from itertools import chain

from cluster.admit.ledger import PipelineLedger
from cluster.admit.request import ValidatedRequest
from cluster.admit.tuning import AdmitTuning
from workers.budget.forecast import Growth


@dataclass(frozen=True)
class Kept:
    """Room on a pipeline for ``more``, which begins as soon as those in its way have ended."""

    pipeline_id: str
    more: Growth
    in_the_way: Set[Hashable]

    def leaves_room(self, ledger: PipelineLedger, other: Growth) -> bool:
        """Whether ``other`` may begin before it, as both fit together once those in the way have ended."""
        then = ledger.without(self.in_the_way)
        then.add(self, self.more)
        return then.fits(other)


class Look:
    """One look at the queue: the smallest that each pipeline refused, and room that is kept for one."""

    def __init__(self, kept: Kept | None = None) -> None:
        self.kept = kept
        self._least: dict[str, Growth] = {}

    def fits(self, ledger: PipelineLedger, more: Growth) -> bool:
        """Whether ``ledger`` has room for ``more``; quick if that is no smaller than what had none."""
        least = self._least.get(ledger.pipeline_id)
        if least is not None and more.covers(least):
            return False
        if ledger.fits(more) and (
            self.kept is None
            or self.kept.pipeline_id != ledger.pipeline_id
            or self.kept.leaves_room(ledger, more)
        ):
            return True
        if least is None or least.covers(more):
            self._least[ledger.pipeline_id] = more
        return False


class Placement:
    """The pipelines that may be given requests, by the room that their ledgers leave.

    Attributes:
        gains: how often there came to be room where there might have been none.
    """

    def __init__(self, tuning: AdmitTuning = AdmitTuning()) -> None:
        self.gains = 0
        self._tuning = tuning
        self._ledgers: dict[str, tuple[float, PipelineLedger]] = {}
        self._by_room: list[tuple[float, str]] = []
        # Pipelines and their last gain, the latest last.
        self._gained: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ledgers)

    def __contains__(self, pipeline_id: str) -> bool:
        return pipeline_id in self._ledgers

    def __iter__(self) -> Iterator[PipelineLedger]:
        """All of them, the roomiest first."""
        return (self._ledgers[pipeline_id][1] for _, pipeline_id in reversed(self._by_room))

    def keep(self, request: ValidatedRequest, expected_tokens: int) -> Kept | None:
        """Keeps room for ``request`` on the roomiest pipeline that could ever hold it."""
        for ledger in self:
            more = ledger.growth(request, expected_tokens)
            if ledger.could_ever_hold(more):
                return Kept(ledger.pipeline_id, more, ledger.in_the_way(more))
        return None

    def gained(self, ledger: PipelineLedger) -> None:
        """Takes a pipeline in, or notes that something has ended there."""
        self._sort(ledger)
        self.gains += 1
        self._gained[ledger.pipeline_id] = self.gains
        self._gained.move_to_end(ledger.pipeline_id)

    def took(self, ledger: PipelineLedger) -> None:
        """Notes that a pipeline has been given something."""
        self._sort(ledger)

    def close(self, pipeline_id: str) -> None:
        """Gives a pipeline nothing more; harmless twice."""
        if pipeline_id in self._ledgers:
            self._unsort(pipeline_id)
            del self._gained[pipeline_id]

    def find(
        self,
        request: ValidatedRequest,
        expected_tokens: int,
        since: int | None,
        home: str | None,
        look: Look,
    ) -> PipelineLedger | None:
        """A pipeline with room for ``request`` until it has ``expected_tokens``, or None.

        Args:
            since: the gains when it was looked for last: only those that have gained since are tried.
            home: the pipeline that has the request's session, which is preferred within the affinity.
            look: this look at the queue.
        """
        first = self._home(home) if home else None
        candidates = self._gained_since(since) if since is not None else iter(self)
        if first is not None and (since is None or self._gained[first.pipeline_id] > since):
            candidates = chain([first], candidates)
        tries = 0
        for ledger in candidates:
            more = ledger.growth(request, expected_tokens)
            if not ledger.could_ever_hold(more):
                continue
            if look.fits(ledger, more):
                return ledger
            tries += 1
            if since is None and tries == self._tuning.roomiest:
                break
        return None

    def _home(self, pipeline_id: str) -> PipelineLedger | None:
        if pipeline_id not in self._ledgers:
            return None
        (most, _), (room, ledger) = self._by_room[-1], self._ledgers[pipeline_id]
        return ledger if most - room <= self._tuning.affinity else None

    def _gained_since(self, since: int) -> Iterator[PipelineLedger]:
        """Those with a gain after ``since``, the roomiest first."""
        gained = []
        for pipeline_id, gain in reversed(self._gained.items()):
            if gain <= since:
                break
            gained.append(self._ledgers[pipeline_id])
        gained.sort(key=lambda each: each[0], reverse=True)
        return (ledger for _, ledger in gained)

    def _sort(self, ledger: PipelineLedger) -> None:
        if ledger.pipeline_id in self._ledgers:
            self._unsort(ledger.pipeline_id)
        room = ledger.room
        self._ledgers[ledger.pipeline_id] = room, ledger
        insort(self._by_room, (room, ledger.pipeline_id))

    def _unsort(self, pipeline_id: str) -> None:
        room, _ = self._ledgers.pop(pipeline_id)
        del self._by_room[bisect_left(self._by_room, (room, pipeline_id))]
