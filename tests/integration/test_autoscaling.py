"""A burst makes a cluster grow by a gang; afterwards it shrinks again, and no stream is lost.

So it is when Serve's controller dies meanwhile.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_process import RunningCluster, eventually, many_users, running_cluster

from pyramidserve import Client, Reply, Stopping

LONG = Stopping(max_tokens=150, ignore_eos=True)
# Says how many placement groups there are on the Ray cluster at an address.
GANGS = """
import sys, ray
from cluster.deploy.serving import joined
with joined(sys.argv[1], lambda told: None):
    print(sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values()))
"""


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, toy: Callable[[str], Path]
) -> Iterator[RunningCluster]:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "shards": 2,
        "pipelines": 1,
        "max_pipelines": 2,
        "kv_bytes": 600_000,  # a few sequences of 250 tokens
        "scale_up_seconds": 0.5,
        "scale_down_seconds": 2.0,
        "cpus_per_shard": 0.25,
        "compression": {"policy": "full"},
    }
    with running_cluster(tmp_path_factory.mktemp("autoscaling"), **settings) as running:
        yield running


def pipelines(cluster: RunningCluster) -> int:
    return len(cluster.state().pipelines)


def served(cluster: RunningCluster) -> set[str]:
    return {pipeline.pipeline_id for pipeline in cluster.state().pipelines}


def ask(client: Client, number: int) -> Reply:
    return client.generate(list(range(3, 103)), request_id=f"r{number}", stopping=LONG)


@pytest.mark.timeout(600)
def test_a_burst_brings_a_gang_and_calm_takes_it_away(cluster: RunningCluster) -> None:
    assert pipelines(cluster) == 1
    with Client(cluster.target) as client, many_users(partial(ask, client)) as answers:
        eventually(lambda: pipelines(cluster) == 2, "no gang was added")
        both = "one gang alone has answered"
        eventually(lambda: len({reply.receipt.pipeline_id for reply in answers}) == 2, both)
    assert {reply.token_ids for reply in answers} == {answers[0].token_ids}
    assert all(len(reply.token_ids) == 150 for reply in answers)
    with Client(cluster.target) as client, ThreadPoolExecutor(4) as users:  # they run while it shrinks
        lasting = [users.submit(ask, client, 1000 + number) for number in range(4)]
        eventually(lambda: pipelines(cluster) == 1, "no gang was taken away")
        later = [reply.result() for reply in lasting]
    assert all(reply.receipt.replays == 0 for reply in [*answers, *later])
    assert "replayed" not in cluster.state().decisions
    cluster.check_empty()


def kill_controller(cluster: RunningCluster) -> None:
    """Kills the process of Serve's controller, on the node that a shard runs on."""
    shard = psutil.Process(cluster.state().pipelines[0].stages[0].pid)
    node = shard.parent()
    assert node is not None
    (controller,) = [each for each in node.children() if each.name().startswith("ray::ServeContr")]
    controller.kill()
    controller.wait(10)


@pytest.mark.timeout(600)
def test_scaling_goes_on_when_the_controller_dies_alone_and_with_a_shard(cluster: RunningCluster) -> None:
    eventually(lambda: pipelines(cluster) == 1, "no gang was taken away")
    kill_controller(cluster)
    with Client(cluster.target) as client, many_users(partial(ask, client)) as answers:
        eventually(lambda: pipelines(cluster) == 2, "no gang was added")
        lost = cluster.state().pipelines[1]
        kill_controller(cluster)
        os.kill(lost.stages[1].pid, signal.SIGKILL)
        eventually(lambda: lost.pipeline_id not in served(cluster), "the router has not noticed the loss")
        eventually(lambda: pipelines(cluster) == 2, "no gang came in its place", 120)
    assert {reply.token_ids for reply in answers} == {answers[0].token_ids}
    assert all(len(reply.token_ids) == 150 for reply in answers)
    eventually(lambda: pipelines(cluster) == 1, "no gang was taken away")
    cluster.check_empty()
    asked = [sys.executable, "-c", GANGS, cluster.ray]
    eventually(
        lambda: subprocess.check_output(asked, text=True, timeout=60) == "1\n", "groups are left over"
    )
