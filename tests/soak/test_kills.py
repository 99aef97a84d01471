"""Whatever is killed under load, every stream comes whole and in order; run by `make soak`."""

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_process import RunningCluster, eventually, running_cluster
from fake_nodes import SETTINGS, Nodes, autoscaling_nodes

from pyramidserve import Client, Compression, Receipt, Stopping, Tokens
from pyramidserve.errors import UnavailableError

KILLS = int(os.environ.get("PYRAMIDSERVE_KILLS", "50"))
WHAT, WEIGHTS = ("shard", "node", "router"), (5, 3, 2)
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


def kill_one(cluster: RunningCluster, nodes: Nodes, what: str, chance: random.Random) -> bool:
    """Kills a shard, the node under one, or the router, if all are there."""
    there = shards(cluster)
    victims = routers(cluster) if what == "router" else there
    if len(there) < SHARDS or not victims:
        return False
    victim = chance.choice(victims)
    try:
        if what == "node":
            nodes.kill_under(victim)
        else:
            os.kill(victim, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):  # it went with its gang
        return False
    eventually(lambda: victim not in [*routers(cluster), *shards(cluster)], "it did not go", 120)
    return True


def ask(client: Client, prompt: list[int]) -> tuple[list[int], Receipt]:
    """A whole reply; asserts that it comes in order, no token twice, and goes on once it has begun."""
    ids: list[int] = []
    try:
        with client.stream(prompt, stopping=LONG, compression=Compression("full")) as events:
            for event in events:
                if isinstance(event, Tokens):
                    assert event.index == len(ids)
                    ids += event.token_ids
                elif isinstance(event, Receipt):
                    return ids, event
    except UnavailableError:
        assert not ids
        raise
    raise AssertionError("the reply ended without a receipt")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streams_outlive_whatever_is_killed(
    dtype: str, tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "dtype": dtype,
        "pipelines": 2,
        "shards": 2,
        "gpus_per_shard": 1.0,  # in name: each shard has a node of its own
        "kv_bytes": 2_000_000,
    }
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    kills: Counter[str] = Counter()
    chance = random.Random(0)
    over = threading.Event()
    with (
        autoscaling_nodes(idle_minutes=60) as nodes,
        running_cluster(tmp_path, address=nodes.address, **settings) as cluster,
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
                assert not any(user.done() for user in using)
                (what,) = chance.choices(WHAT, WEIGHTS)
                eventually(
                    partial(kill_one, cluster, nodes, what, chance), "the cluster did not come back", 180
                )
                kills[what] += 1
        finally:
            over.set()
        replies = [reply for user in using for reply in user.result()]
        cluster.check_empty()
    assert len(replies) > KILLS
    assert all(len(ids) == OUTPUT for _, ids, _ in replies)
    same = sum(ids == expected[number] for number, ids, _ in replies)
    replays = sum(receipt.replays for *_, receipt in replies)
    print(f"killed {dict(kills)}: {len(replies)} replies, {same} as undisturbed, {replays} replays")
    if dtype == "float32":
        assert same >= 0.95 * len(replies)  # near ties may fall otherwise in another batch
