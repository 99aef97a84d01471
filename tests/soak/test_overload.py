"""Ten times as many requests as can be served: refused in time, and the others are served as ever."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cluster_process import running_cluster
from test_cancels import Held, held
from test_kills import routers, shards

from pyramidserve import AsyncClient, Compression, Stopping
from pyramidserve.errors import OverloadedError

MINUTES = float(os.environ.get("PYRAMIDSERVE_OVERLOAD_MINUTES", "5"))
OVERLOAD, QUEUE_LIMIT, MEASURED_SECONDS = 10, 32, 15.0
PROMPT, STOPPING = list(range(3, 43)), Stopping(max_tokens=24, ignore_eos=True)
COMPRESSION = Compression("pyramid", "prune", kv_keep=0.8)


@dataclass
class Counts:
    """What became of requests; times in seconds."""

    first_tokens: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)
    delays: list[float | None] = field(default_factory=list)


async def ask(client: AsyncClient, counts: Counts) -> None:
    try:
        reply = await client.generate(PROMPT, stopping=STOPPING, compression=COMPRESSION)
    except OverloadedError as error:
        counts.delays.append(error.retry_delay)
        return
    counts.first_tokens.append(reply.receipt.time_to_first_token)
    counts.inter_token.append(reply.receipt.inter_token_p50)


async def sustained(client: AsyncClient) -> float:
    """Requests a second that the cluster serves when as many wait as may."""
    counts, until = Counts(), time.monotonic() + MEASURED_SECONDS

    async def use() -> None:
        while time.monotonic() < until:
            await ask(client, counts)

    await asyncio.gather(*(use() for _ in range(QUEUE_LIMIT)))
    assert not counts.delays
    return len(counts.first_tokens) / MEASURED_SECONDS


async def overload(client: AsyncClient, rate: float, sample: Callable[[], None]) -> Counts:
    """Asks at ``rate`` a second, whatever becomes of it."""
    counts, running = Counts(), set()
    began, asked, sampled = time.monotonic(), 0, 0.0
    while (now := time.monotonic() - began) < 60 * MINUTES:
        while asked < now * rate:
            task = asyncio.create_task(ask(client, counts))
            running.add(task)
            task.add_done_callback(running.discard)
            asked += 1
        if now >= sampled:
            sample()
            sampled += 5
        await asyncio.sleep(0.01)
    await asyncio.gather(*running)
    return counts


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_times_too_much_is_refused_and_the_rest_served(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "dtype": "float32",
        "shards": 2,
        "cpus_per_shard": 0.5,
        "kv_bytes": 1 << 20,
        "max_sequences": 8,
        "queue_limit": QUEUE_LIMIT,
    }
    with running_cluster(tmp_path, **settings) as cluster:
        pids, samples = [*routers(cluster), *shards(cluster)], list[Held]()

        async def scenario() -> tuple[float, Counts]:
            async with AsyncClient(cluster.target) as client:
                rate = await sustained(client)
                counts = await overload(client, OVERLOAD * rate, lambda: samples.append(held(pids)))
                return rate, counts

        rate, counts = asyncio.run(scenario())
        cluster.check_empty()
        assert sorted(pids) == sorted([*routers(cluster), *shards(cluster)])
    served = len(counts.first_tokens) / (60 * MINUTES)
    first = sorted(counts.first_tokens)[int(0.99 * len(counts.first_tokens))]
    early, late = samples[len(samples) // 4].resident, samples[-1].resident
    print(
        f"{rate:.0f} requests/s sustained; at {OVERLOAD} times that {served:.0f} served, "
        f"{len(counts.delays) / 60 / MINUTES:.0f} refused; first token p99 {first:.2f} s; resident "
        f"{early >> 20} MiB after a quarter, {late >> 20} at the end"
    )
    assert counts.delays
    assert all(delay is not None and 0 < delay <= 30 for delay in counts.delays)
    # A request that waits behind a full queue and those that run, and some for what refusing costs.
    assert first < 3 * (QUEUE_LIMIT + 8) / rate + 1
    assert late < 1.05 * early
