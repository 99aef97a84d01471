"""Burst after burst brings a gang, and calm takes it away; run by `make soak`."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from cluster_process import eventually, running_cluster

from pyramidserve import Client, Reply, Stopping

CYCLES = int(os.environ.get("PYRAMIDSERVE_CYCLES", "20"))
BURST, OUTPUT = 300, 150
LONG = Stopping(max_tokens=OUTPUT, ignore_eos=True)
# From the burst until a gang that was not there has something to do, while the burst takes all cores.
MOST_SECONDS = 25.0


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_burst_gets_its_gang_and_no_stream_is_lost(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "shards": 2,
        "pipelines": 1,
        "max_pipelines": 2,
        "kv_bytes": 600_000,
        "scale_up_seconds": 0.5,
        "scale_down_seconds": 2.0,
        "cpus_per_shard": 0.25,
        "compression": {"policy": "full"},
    }
    took: list[float] = []
    with (
        running_cluster(tmp_path, **settings) as cluster,
        Client(cluster.target) as client,
        ThreadPoolExecutor(BURST) as users,
    ):

        def serving() -> set[str]:
            return {pipeline.pipeline_id for pipeline in cluster.state().pipelines}

        def works_beside(old: str) -> bool:
            pipelines = cluster.state().pipelines
            return any(each.pipeline_id != old and each.sequences for each in pipelines)

        def ask(number: int) -> Reply:
            return client.generate(list(range(3, 103)), request_id=f"r{number}", stopping=LONG)

        for cycle in range(CYCLES):
            (old,) = serving()
            began = time.monotonic()
            replies = [users.submit(ask, BURST * cycle + number) for number in range(BURST)]
            eventually(partial(works_beside, old), "no gang was added that gets something to do")
            took.append(time.monotonic() - began)
            answers = [reply.result() for reply in replies]
            assert all(len(reply.token_ids) == OUTPUT for reply in answers)
            assert all(reply.receipt.replays == 0 for reply in answers)
            eventually(lambda: len(serving()) == 1, "no gang was taken away", 120)
        assert "replayed" not in cluster.state().decisions
        cluster.check_empty()
    print(
        f"{CYCLES} cycles; from a burst to a new gang at work: median {median(took):.1f} s, "
        f"at most {max(took):.1f} s"
    )
    assert median(took) <= MOST_SECONDS
