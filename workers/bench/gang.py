"""A pipeline of processes without Ray: what shards cost beside one process, and nothing else.

Each process keeps to cores of its own: left to itself, the kernel wakes the threads of a process that has
received something on the core where another computes, and steps wait for milliseconds.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from workers.engine.interleave import OnAdvance
from workers.engine.pipeline import Connect, Connected
from workers.engine.stage import Stage, StageConfig
from workers.engine.transport import Ring, RingPipeline, follow

HOST, TIMEOUT = "127.0.0.1", timedelta(minutes=5)
CPU = torch.device("cpu")


@contextmanager
def gang(threads: int, on_advance: OnAdvance) -> Iterator[Connect]:
    """Connects the first shard in this process with others in processes of their own, which end with it.

    Args:
        threads: of each process.
        on_advance: told of the first shard's steps and blocks.
    """
    spawn = multiprocessing.get_context("spawn")
    followers: list[multiprocessing.process.BaseProcess] = []
    all_cores, all_threads = os.sched_getaffinity(0), torch.get_num_threads()

    def connect(configs: Sequence[StageConfig]) -> Connected:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        size = len(configs)
        store = TCPStore(HOST, 0, size, True, TIMEOUT, wait_for_workers=False)
        for rank, config in enumerate(configs[1:], 1):
            arguments = (config, rank, size, store.port, threads, cores_of(rank, threads, all_cores))
            followers.append(spawn.Process(target=_follow, args=arguments, daemon=True))
            followers[-1].start()
        os.sched_setaffinity(0, cores_of(0, threads, all_cores))
        torch.set_num_threads(threads)
        stage = Stage(configs[0])
        ring = Ring(store, 0, size, CPU)
        facts = ring.gather_facts(stage.facts(HOST))
        return Connected(RingPipeline(stage, ring, on_advance), facts, (stage,))

    try:
        yield connect
    finally:
        for follower in followers:
            follower.terminate()
            follower.join()
        os.sched_setaffinity(0, all_cores)
        torch.set_num_threads(all_threads)


def cores_of(rank: int, threads: int, cores: AbstractSet[int]) -> set[int]:
    """The ``threads`` cores of a rank's own; all, where there are not so many."""
    first = rank * threads
    return set(sorted(cores)[first : first + threads]) or set(cores)


def _follow(config: StageConfig, rank: int, size: int, port: int, threads: int, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    store = TCPStore(HOST, port, size, False, TIMEOUT)
    stage = Stage(config)
    ring = Ring(store, rank, size, CPU)
    ring.gather_facts(stage.facts(HOST))
    follow(stage, ring)
