"""The order in which requests wait: fair between tenants, by priority and age within each. Pure."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from cluster.admit.request import ValidatedRequest
from pyramidserve.types import Priority

# How much sooner or later than it did a request counts as having arrived, in seconds. So it is overtaken by
# those of its tenant alone that arrive up to twice as long after it, and never by more.
HEAD_START: dict[Priority, float] = {"high": 30.0, "normal": 0.0, "low": -30.0}


class Waiting(Protocol):
    """What stands in the queue; ``arrived`` is in seconds."""

    @property
    def request(self) -> ValidatedRequest: ...

    @property
    def arrived(self) -> float: ...

    @property
    def tenant(self) -> str: ...


Item = TypeVar("Item", bound=Waiting)


class _Line(Generic[Item]):
    """What waits of one tenant, and how much it has been served, over its weight."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.served = 0.0
        self.items: list[Item] = []

    def place(self, item: Item) -> int | None:
        """Where ``item`` stands; None if it does not."""
        rank = _rank(item)
        first, end = (bisect(self.items, rank, key=_rank) for bisect in (bisect_left, bisect_right))
        return next((place for place in range(first, end) if self.items[place] is item), None)


class Queue(Generic[Item]):
    """Tenants take turns by what they have been served (start-time fair queueing, Goyal et al., 1996).

    A tenant that comes back after a while is not owed what it did not ask for.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """``weights``: of the tenants; one that is not there weighs 1."""
        self._weights = weights
        self._lines: dict[str, _Line[Item]] = {}
        self._length = 0
        # What the tenant that was served last had been served before.
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, item: Item) -> bool:
        return self._line(item).place(item) is not None

    def __iter__(self) -> Iterator[Item]:
        """All that wait, in the order in which they would be served now."""
        served = {name: line.served for name, line in self._lines.items() if line.items}
        waiting = {name: iter(self._lines[name].items) for name in served}
        while served:
            name = min(served, key=lambda each: served[each])
            item = next(waiting[name], None)
            if item is None:
                del served[name]
                continue
            served[name] += cost(item.request) / self._lines[name].weight
            yield item

    def waiting(self, tenant: str) -> int:
        """How many items wait of one tenant."""
        return len(self._lines[tenant].items) if tenant in self._lines else 0

    def before(self, tenant: str) -> int:
        """About how many would be served before what a tenant adds now, were all of them of one size."""
        own = self.waiting(tenant)
        turns = (own + 1) / self._weights.get(tenant, 1.0)
        others = (line for name, line in self._lines.items() if name != tenant)
        return own + int(sum(min(len(line.items), turns * line.weight) for line in others))

    def share(self, tenant: str, places: int) -> int:
        """How many of ``places`` are a tenant's by its weight, whoever else wants them; at least one."""
        weights = {name: line.weight for name, line in self._lines.items()} | dict(self._weights)
        weight = weights.setdefault(tenant, 1.0)
        return max(1, int(places * weight / sum(weights.values())))

    def add(self, item: Item) -> None:
        """Takes an item in, by its priority and the time of its arrival."""
        line = self._line(item)
        if not line.items:
            line.served = max(line.served, self._virtual_time)
        insort(line.items, item, key=_rank)
        self._length += 1

    def remove(self, item: Item) -> bool:
        """Takes an item out; returns whether it was there."""
        line = self._line(item)
        place = line.place(item)
        if place is None:
            return False
        del line.items[place]
        self._length -= 1
        return True

    def serve(self, item: Item) -> None:
        """Takes an item out that is served now."""
        line = self._line(item)
        self.remove(item)
        self._virtual_time = max(self._virtual_time, line.served)
        line.served += cost(item.request) / line.weight

    def _line(self, item: Item) -> _Line[Item]:
        if item.tenant not in self._lines:
            self._lines[item.tenant] = _Line(self._weights.get(item.tenant, 1.0))
        return self._lines[item.tenant]


def cost(request: ValidatedRequest) -> float:
    """What serving a request takes, in tokens."""
    return float(len(request.prompt_ids) + request.max_tokens)


def _rank(item: Waiting) -> float:
    return item.arrived - HEAD_START[item.request.priority]
