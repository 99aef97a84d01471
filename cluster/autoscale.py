"""How many pipelines there should be, from the memory that requests want."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

METRIC = "demand"


class Context(Protocol):
    """What Serve tells a policy, as far as it matters here."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...

    @property
    def target_num_replicas(self) -> int: ...


class MemoryPressurePolicy:
    """Serve's policy for the shards: whole gangs, so that ``demand`` fills them to ``target``.

    The heads report what the router has told them: how many pipelines the requests would fill that run or
    wait there, after compression and with the growth that is expected of them.
    """

    def __init__(self, shards: int, target: float) -> None:
        """``shards`` of a gang; ``target``: the share of a pipeline's memory that is to be used."""
        self._shards, self._target = shards, target

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, which Serve bounds and delays; those of now if no head has reported."""
        told = (context.aggregated_metrics or {}).get(METRIC)
        if not told:
            return context.target_num_replicas, {}
        return pipelines_for(max(told.values()), self._target) * self._shards, {}


def pipelines_for(demand: float, target: float) -> int:
    """Pipelines that ``demand`` fills to ``target``; one at least."""
    return max(1, math.ceil(demand / target - 1e-9))


def pipelines_filled(running: Iterable[float], waiting: Iterable[float]) -> float:
    """Pipelines that the shares of all that run and wait fill; one cannot be more than full."""
    return sum(min(each, 1.0) for each in running) + sum(waiting)
