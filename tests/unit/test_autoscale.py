"""How many pipelines there should be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.autoscale import METRIC, MemoryPressurePolicy, pipelines_filled, pipelines_for


@dataclass(frozen=True)
class Told:
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None
    target_num_replicas: int = 6


@pytest.mark.parametrize(
    ("demand", "target", "pipelines"),
    [(0.0, 0.8, 1), (0.8, 0.8, 1), (0.81, 0.8, 2), (3.2, 0.8, 4), (2.4, 0.8, 3), (5.0, 1.0, 5)],
)
def test_pipelines_are_filled_to_the_target(demand: float, target: float, pipelines: int) -> None:
    assert pipelines_for(demand, target) == pipelines


def test_the_policy_wants_whole_gangs() -> None:
    policy = MemoryPressurePolicy(shards=3, target=0.5)
    assert policy(Told({METRIC: {"head": 0.9, "new head": 0.0}})) == (6, {})
    assert policy(Told({METRIC: {"head": 1.1}})) == (9, {})


@pytest.mark.parametrize("metrics", [None, {}, {METRIC: {}}])
def test_without_a_report_all_stays_as_it_is(metrics: Mapping[str, Mapping[Any, float]] | None) -> None:
    assert MemoryPressurePolicy(shards=2, target=0.5)(Told(metrics)) == (6, {})


def test_a_pipeline_is_never_more_than_full() -> None:
    assert pipelines_filled([0.75, 1.5], [0.5, 0.5]) == 2.75
