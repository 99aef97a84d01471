"""The clusters that integration tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_process import RunningCluster, free_port, running_cluster


@pytest.fixture(scope="session")
def toy_cluster(
    tmp_path_factory: pytest.TempPathFactory, toy: Callable[[str], Path]
) -> Iterator[RunningCluster]:
    """Two shards of a toy model, fp32, that keep the full cache unless asked otherwise."""
    with running_cluster(
        tmp_path_factory.mktemp("toy-cluster"),
        options=("--log-level", "info"),
        model=str(toy("gqa")),
        dtype="float32",
        shards=2,
        kv_bytes=2 << 20,
        host_bytes=2 << 20,
        max_sequences=16,
        queue_limit=64,
        compression={"policy": "full"},
        http_port=free_port(),
        served_model_name="toy",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def tiny_pool(
    tmp_path_factory: pytest.TempPathFactory, toy: Callable[[str], Path]
) -> Iterator[RunningCluster]:
    """One shard without a gang, whose pool holds about two short sequences."""
    with running_cluster(
        tmp_path_factory.mktemp("tiny-pool"),
        model=str(toy("gqa")),
        dtype="float32",
        shards=1,
        kv_bytes=30 * 4096,
        host_bytes=1 << 20,
        max_sequences=4,
        compression={"policy": "full"},
    ) as cluster:
        yield cluster
