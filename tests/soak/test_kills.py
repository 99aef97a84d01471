"""Whatever is killed under load, every stream comes whole and in order; run by `make soak`."""

import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_process import RunningCluster, eventually, running_cluster

from pyramidserve import Client, Compression, Receipt, Stopping, Tokens
from pyramidserve.errors import UnavailableError

KILLS = int(os.environ.get("PYRAMIDSERVE_KILLS", "50"))
USERS, OUTPUT, SHARDS = 6, 120, 4
PROMPTS = [list(range(3 + 5 * number, 60 + 5 * number)) for number in range(8)]
LONG = Stopping(max_tokens=OUTPUT, ignore_eos=True)


def routers(cluster: RunningCluster) -> list[int]:
    """The process that listens at the target, which is the router's."""
    port = int(cluster.target.rpartition(":")[2])
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return [each.pid for each in listening if each.pid and each.laddr and each.laddr.port == port]


def shards(cluster: RunningCluster) -> list[int]:
    return [stage.pid for pipeline in cluster.state().pipelines for stage in pipeline.stages]


def kill_one(cluster: RunningCluster, chance: random.Random) -> bool:
    """Kills a shard, or now and then the router, if all are there."""
    there = shards(cluster)
    if len(there) < SHARDS:
        return False
    victim = chance.choice(there if chance.random() < 0.8 else routers(cluster) or there)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:  # it went with its gang
        return False
    eventually(lambda: victim not in [*routers(cluster), *shards(cluster)], "it did not go", 120)
    return True


def ask(client: Client, prompt: list[int]) -> tuple[list[int], Receipt]:
    """A whole reply; asserts that it comes in order, and no token twice."""
    ids: list[int] = []
    with client.stream(prompt, stopping=LONG, compression=Compression("full")) as events:
        for event in events:
            if isinstance(event, Tokens):
                assert event.index == len(ids)
                ids += event.token_ids
            elif isinstance(event, Receipt):
                return ids, event
    raise AssertionError("the reply ended without a receipt")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streams_outlive_whatever_is_killed(dtype: str, tmp_path: Path, toy: Callable[[str], Path]) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "dtype": dtype,
        "pipelines": 2,
        "shards": 2,
        "cpus_per_shard": 0.25,
        "kv_bytes": 2_000_000,
    }
    chance = random.Random(0)
    over = threading.Event()
    with (
        running_cluster(tmp_path, **settings) as cluster,
        Client(cluster.target, resume_seconds=120) as client,
        ThreadPoolExecutor(USERS) as users,
    ):
        expected = [ask(client, prompt)[0] for prompt in PROMPTS]

        def use(user: int) -> list[tuple[int, list[int], Receipt]]:
            replies: list[tuple[int, list[int], Receipt]] = []
            while not over.is_set():
                number = len(replies) % len(PROMPTS)
                try:
                    replies.append((number, *ask(client, PROMPTS[number])))
                except UnavailableError:
                    continue  # one that had not begun may be asked again
            return replies

        using = [users.submit(use, user) for user in range(USERS)]
        try:
            for _ in range(KILLS):
                eventually(lambda: kill_one(cluster, chance), "the cluster did not come back", 120)
        finally:
            over.set()
        replies = [reply for user in using for reply in user.result()]
        cluster.check_empty()
    assert len(replies) > KILLS
    assert all(len(ids) == OUTPUT for _, ids, _ in replies)
    same = sum(ids == expected[number] for number, ids, _ in replies)
    print(f"{len(replies)} replies, {same} as undisturbed, {sum(r.replays for *_, r in replies)} replays")
    if dtype == "float32":
        assert same >= 0.95 * len(replies)  # near ties may fall otherwise in another batch
