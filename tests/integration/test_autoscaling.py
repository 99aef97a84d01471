"""A burst makes a cluster grow by a gang; afterwards it shrinks again, and no stream is lost."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_process import eventually, running_cluster

from pyramidserve import Client, Reply, Stopping

LONG = Stopping(max_tokens=150, ignore_eos=True)


@pytest.mark.timeout(600)
def test_a_burst_brings_a_gang_and_calm_takes_it_away(tmp_path: Path, toy: Callable[[str], Path]) -> None:
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
    with running_cluster(tmp_path, **settings) as cluster, Client(cluster.target) as client:

        def pipelines() -> int:
            return len(cluster.state().pipelines)

        def ask(number: int) -> Reply:
            return client.generate(list(range(3, 103)), request_id=f"r{number}", stopping=LONG)

        assert pipelines() == 1
        with ThreadPoolExecutor(300) as users:
            replies = [users.submit(ask, number) for number in range(300)]
            eventually(lambda: pipelines() == 2, "no gang was added")
            answers = [reply.result() for reply in replies]
        assert {reply.token_ids for reply in answers} == {answers[0].token_ids}
        assert all(len(reply.token_ids) == 150 for reply in answers)
        assert len({reply.receipt.pipeline_id for reply in answers}) == 2
        with ThreadPoolExecutor(4) as users:  # these run while it shrinks
            lasting = [users.submit(ask, 1000 + number) for number in range(4)]
            eventually(lambda: pipelines() == 1, "no gang was taken away")
            later = [reply.result() for reply in lasting]
        assert all(reply.receipt.replays == 0 for reply in [*answers, *later])
        assert "replayed" not in cluster.state().decisions
        cluster.check_empty()
