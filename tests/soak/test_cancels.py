"""Users of every kind come and go for long, and leave nothing behind; run by `make soak`."""

import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_process import eventually, running_cluster
from test_kills import routers, shards

from pyramidserve import ChatMessage, Client, Compression, Stopping
from pyramidserve.errors import (
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    UnknownSessionError,
)

MINUTES = float(os.environ.get("PYRAMIDSERVE_SOAK_MINUTES", "30"))
USERS = 8
SAMPLE_SECONDS = 5.0
EVICT = Compression("pyramid", "evict", kv_keep=0.6)
COMPRESSIONS = (
    Compression(),
    Compression("pyramid", "prune", kv_keep=0.6),
    EVICT,
    Compression("pyramid", "prune", kv_keep=0.6, recall="turn"),
    Compression("pyramid", "evict", kv_keep=0.6, recall="turn"),
    Compression("pyramid", "evict", kv_keep=0.6, recall="step"),
    Compression("pyramid", "evict", kv_keep=0.6, recall="exact"),
)


@dataclass(frozen=True)
class Held:
    """What the processes of a cluster hold: resident bytes, file descriptors, threads."""

    resident: int
    files: int
    threads: int


def held(pids: list[int]) -> Held:
    processes = [psutil.Process(pid) for pid in pids]
    return Held(
        sum(process.memory_info().rss for process in processes),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
    )


def talk(client: Client, chance: random.Random, name: str) -> int:
    """A session of a few turns, some of them left before their end; returns how many ended well."""
    history: list[ChatMessage] = []
    compression, ended = chance.choice(COMPRESSIONS), 0
    for _ in range(chance.randrange(1, 4)):
        history.append(ChatMessage("user", "word " * chance.randrange(1, 9)))
        stopping = Stopping(max_tokens=chance.randrange(1, 40), ignore_eos=True)
        leaves = chance.randrange(1, 20) if chance.random() < 0.4 else None
        pause = 0.02 if chance.random() < 0.2 else 0.0
        text = ""
        try:
            with client.stream(
                history, stopping=stopping, compression=compression, session_id=name
            ) as events:
                for number, event in enumerate(events):
                    text += getattr(event, "text", "")
                    if number == leaves:
                        return ended
                    if pause:  # a slow reader
                        threading.Event().wait(pause)
        except (OverloadedError, RequestTimeoutError):
            return ended
        except InvalidRequestError as error:
            if "the context of" in error.message:  # the session has become too long
                return ended
            raise
        ended += 1
        history.append(ChatMessage("assistant", text))
    if chance.random() < 0.5:
        with suppress(UnknownSessionError):
            client.end_session(name)
    return ended


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nothing_is_left_of_those_who_come_and_go(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "dtype": "float32",
        "shards": 2,
        "cpus_per_shard": 0.5,
        "kv_bytes": 1 << 20,
        "host_bytes": 2 << 20,
        "max_sequences": 6,
        "max_sessions": 4,
        "session_max_age": 20.0,
        "session_limit": 50,
        "queue_limit": 16,
    }
    over = threading.Event()
    with (
        running_cluster(tmp_path, **settings) as cluster,
        Client(cluster.target) as client,
        ThreadPoolExecutor(USERS) as users,
    ):
        pids = [*routers(cluster), *shards(cluster)]
        assert len(pids) == 3

        def use(user: int) -> int:
            chance, ended = random.Random(user), 0
            for number in iter(int, None):
                if over.is_set():
                    return ended
                ended += talk(client, chance, f"{user}-{number}-{chance.random()}")
            return ended

        using = [users.submit(use, user) for user in range(USERS)]
        samples: list[Held] = []
        until = time.monotonic() + 60 * MINUTES
        try:
            while time.monotonic() < until and not any(user.done() for user in using):
                over.wait(SAMPLE_SECONDS)
                samples.append(held(pids))
        finally:
            over.set()
        ended = sum(user.result() for user in using)
        eventually(lambda: cluster.state().sessions == 0, "sessions do not expire", 90)
        cluster.check_empty()
        assert sorted(pids) == sorted([*routers(cluster), *shards(cluster)])
        last = held(pids)
    report(samples, last, ended)
    early, late = samples[len(samples) // 3 : len(samples) // 2], samples[-len(samples) // 6 :]
    grown = middle(late).resident / middle(early).resident
    assert grown < 1.05, f"resident memory has grown by {grown - 1:.1%} since the first third"
    assert last.files <= middle(early).files + 8
    assert last.threads <= middle(early).threads + 8


def middle(samples: list[Held]) -> Held:
    """The median of each."""
    return Held(
        *(
            int(statistics.median(getattr(each, name) for each in samples))
            for name in ("resident", "files", "threads")
        )
    )


def report(samples: list[Held], last: Held, ended: int) -> None:
    early, late = middle(samples[: len(samples) // 2]), middle(samples[len(samples) // 2 :])
    print(
        f"{ended} turns ended well; resident {early.resident >> 20} MiB in the first half, "
        f"{late.resident >> 20} in the second, {last.resident >> 20} at the end; files {early.files}, "
        f"{late.files}, {last.files}; threads {early.threads}, {late.threads}, {last.threads}"
    )
