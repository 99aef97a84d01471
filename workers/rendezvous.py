"""Where the processes of a cluster find each other: Ray's key-value store."""

import asyncio
import json
from datetime import timedelta

import ray
from ray import serve
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from workers import ray_private

POLL_SECONDS = 0.05


def node_address() -> str:
    """Where other nodes reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def router_key() -> str:
    """Where the router of this replica's application announces its address."""
    return f"router/{serve.get_replica_context().app_name}"


def announce(key: str, value: dict[str, str | int]) -> None:
    """Lets others read ``value`` under ``key``."""
    ray_private.put(f"pyramidserve/{key}", json.dumps(value).encode())


async def look_up(key: str) -> dict[str, str | int]:
    """Waits until ``key`` is announced."""
    while True:
        value = await asyncio.to_thread(ray_private.get, f"pyramidserve/{key}")
        if value is not None:
            announced: dict[str, str | int] = json.loads(value)
            return announced
        await asyncio.sleep(POLL_SECONDS)


async def meet(gang: str, rank: int, size: int, host: str, timeout_seconds: float) -> Store:
    """The gang's common store; rank 0 opens it on ``host`` and tells the others where.

    Raises TimeoutError when the gang is not there in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    key = f"gang/{gang}"
    if rank == 0:
        # Port 0: the kernel picks a free one, so that no other process can take it in between.
        store = TCPStore(host, 0, size, True, timeout, wait_for_workers=False)
        await asyncio.to_thread(announce, key, {"host": host, "port": store.port})
        return store
    async with asyncio.timeout(timeout_seconds):
        address = await look_up(key)
    return await asyncio.to_thread(
        TCPStore, str(address["host"]), int(address["port"]), size, False, timeout
    )
