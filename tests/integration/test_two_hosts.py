"""A gang over two hosts, each with its own address: it forms, serves, and outlives the loss of one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from cluster_process import RunningCluster, eventually, running_cluster
from two_hosts import FIRST, FIRST_FOR_CLIENTS, SECOND, Hosts, two_hosts

from pyramidserve import Client, Event, Receipt, Sampling, Stopping, Tokens

PROMPT = list(range(3, 103))
LONG = Stopping(max_tokens=1000, ignore_eos=True)
GREEDY = Sampling()
# A step that takes longer than this restarts its gang.
STALL_SECONDS = 5.0
NOTICED_SECONDS, REFORMED_SECONDS = 30.0, 180.0


@pytest.fixture
def hosts_and_cluster(tmp_path: Path, toy: Callable[[str], Path]) -> Iterator[tuple[Hosts, RunningCluster]]:
    """One pipeline of two shards, each of which takes a whole host; all addresses are the defaults."""
    with (
        two_hosts() as hosts,
        running_cluster(
            tmp_path,
            address=hosts.address,
            prefix=hosts.on_first(),
            reached_at=FIRST_FOR_CLIENTS,
            model=str(toy("long")),
            dtype="float32",
            shards=2,
            cpus_per_shard=1.0,
            kv_bytes=8 << 20,
            host_bytes=2 << 20,
            stall_seconds=STALL_SECONDS,
            router_host="0.0.0.0",
            compression={"policy": "full"},
        ) as cluster,
    ):
        yield hosts, cluster


class Stream(Thread):
    """A long reply that is read as it comes."""

    def __init__(self, client: Client) -> None:
        super().__init__(name="stream")
        self._client = client
        self.events: list[Event] = []

    def run(self) -> None:
        for event in self._client.stream(PROMPT, sampling=GREEDY, stopping=LONG):
            self.events.append(event)

    @property
    def token_ids(self) -> list[int]:
        chunks = (event for event in list(self.events) if isinstance(event, Tokens))
        return [token for chunk in chunks for token in chunk.token_ids]


def _outlives(hosts: Hosts, cluster: RunningCluster, client: Client, lose: Callable[[], None]) -> list[int]:
    """The output of a stream while which the second host is lost, and then starts anew."""

    def gang() -> str:
        return "".join(pipeline.pipeline_id for pipeline in cluster.state().pipelines)

    before, stream = gang(), Stream(client)
    stream.start()
    eventually(lambda: len(stream.token_ids) > 5, "the stream has not begun")
    lose()
    eventually(lambda: gang() != before, "the loss has not been noticed", NOTICED_SECONDS)
    hosts.wire("up")
    hosts.start_second()
    stream.join(REFORMED_SECONDS)
    assert not stream.is_alive(), "the gang has not been formed anew"
    receipt = stream.events[-1]
    assert isinstance(receipt, Receipt)
    assert receipt.pipeline_id != before
    assert receipt.replays >= 1
    return stream.token_ids


@pytest.mark.timeout(400)
def test_a_gang_over_two_hosts_serves_and_outlives_a_cut_wire_and_a_lost_host(
    hosts_and_cluster: tuple[Hosts, RunningCluster],
) -> None:
    hosts, cluster = hosts_and_cluster
    (pipeline,) = cluster.state().pipelines
    assert {stage.node for stage in pipeline.stages} == {FIRST, SECOND}
    with Client(cluster.target) as client:
        whole = list(client.generate(PROMPT, sampling=GREEDY, stopping=LONG).token_ids)
        assert _outlives(hosts, cluster, client, lambda: hosts.wire("down")) == whole
        assert _outlives(hosts, cluster, client, hosts.kill_second) == whole
    cluster.check_empty()
