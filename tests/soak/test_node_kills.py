"""Whatever node dies under load, every stream comes whole and in order; run by `make soak`."""

import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster_process import eventually, running_cluster
from fake_nodes import SETTINGS, autoscaling_nodes
from test_kills import PROMPTS, USERS, ask, shards

from pyramidserve import Client, Receipt

KILLS = int(os.environ.get("PYRAMIDSERVE_NODE_KILLS", "10"))
SHARDS = 4


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_streams_outlive_nodes(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "dtype": "float32",
        "pipelines": 2,
        "shards": 2,
        "gpus_per_shard": 1.0,
        "kv_bytes": 2_000_000,
    }
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    chance, over = random.Random(0), threading.Event()
    with (
        autoscaling_nodes(idle_minutes=60) as nodes,
        running_cluster(tmp_path, address=nodes.address, **settings) as cluster,
        Client(cluster.target) as client,
        ThreadPoolExecutor(USERS) as users,
    ):
        undisturbed = [ask(client, prompt)[0] for prompt in PROMPTS]

        def gone(victim: int) -> bool:
            return victim not in shards(cluster)

        def use(user: int) -> list[Receipt]:
            receipts: list[Receipt] = []
            while not over.is_set():
                prompt = (user + len(receipts)) % len(PROMPTS)
                ids, receipt = ask(client, PROMPTS[prompt])
                assert ids == undisturbed[prompt]
                receipts.append(receipt)
            return receipts

        using = [users.submit(use, user) for user in range(USERS)]
        try:
            for _ in range(KILLS):
                eventually(lambda: len(shards(cluster)) == SHARDS, "the gangs do not come back", 180)
                assert not any(user.done() for user in using)
                victim = chance.choice(shards(cluster))
                nodes.kill_under(victim)
                eventually(partial(gone, victim), "it did not go")
        finally:
            over.set()
        receipts = [receipt for user in using for receipt in user.result()]
        cluster.check_empty()
    replays = sum(receipt.replays for receipt in receipts)
    print(f"{KILLS} nodes killed; {len(receipts)} replies whole and in order, {replays} replays")
    assert replays >= 1
