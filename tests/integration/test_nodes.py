"""Gangs bring nodes as in ``deploy/ray-cluster.yaml``, lose one under load, and take them away."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_process import RunningCluster, eventually, many_users, running_cluster
from fake_nodes import SETTINGS, Nodes, autoscaling_nodes

from pyramidserve import Client, Reply, Stopping

LONG = Stopping(max_tokens=150, ignore_eos=True)
PROMPT = list(range(3, 103))


@pytest.fixture
def nodes_and_cluster(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Nodes, RunningCluster]]:
    """One pipeline of two shards on nodes with a GPU each, in name, and room for another."""
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "shards": 2,
        "pipelines": 1,
        "max_pipelines": 2,
        "kv_bytes": 600_000,  # a few sequences of 250 tokens
        "scale_up_seconds": 0.5,
        "scale_down_seconds": 5.0,
        "cpus_per_shard": 1.0,
        "gpus_per_shard": 1.0,
        "compression": {"policy": "full"},
    }
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    with (
        autoscaling_nodes(idle_minutes=0.1) as nodes,
        running_cluster(tmp_path, address=nodes.address, **settings) as cluster,
    ):
        yield nodes, cluster


@pytest.mark.timeout(900)
def test_nodes_come_and_go_with_the_load_and_one_that_dies_costs_no_stream(
    nodes_and_cluster: tuple[Nodes, RunningCluster],
) -> None:
    nodes, cluster = nodes_and_cluster
    with Client(cluster.target) as client:

        def pipelines() -> int:
            return len(cluster.state().pipelines)

        def ask(number: int) -> Reply:
            return client.generate(PROMPT, request_id=f"r{number}", stopping=LONG)

        def second_runs() -> bool:
            return pipelines() == 2 and all(each.sequences for each in cluster.state().pipelines)

        assert (pipelines(), nodes.added()) == (1, 2)
        with many_users(ask) as answers:
            eventually(second_runs, "no gang was added", 120)
            assert nodes.added() == 4
            nodes.kill_under(cluster.state().pipelines[-1].stages[-1].pid)
            eventually(
                lambda: any(reply.receipt.replays for reply in answers),
                "no stream of the lost node was replayed",
                120,
            )
        assert {reply.token_ids for reply in answers} == {answers[0].token_ids}
        assert all(len(reply.token_ids) == 150 for reply in answers)
        eventually(lambda: (pipelines(), nodes.added()) == (1, 2), "the nodes have not gone", 120)
        cluster.check_empty()
