"""Where the processes of a cluster find each other: Ray's key-value store, and addresses of its nodes."""

import asyncio
import json
import socket
from datetime import timedelta

import psutil
import ray
from ray import serve
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from pyramidserve.errors import ConfigurationError
from workers import ray_private

POLL_SECONDS = 0.05
LOOPBACK = "127.0.0.1"
_OWN_CLUSTER = "pyramidserve/own_cluster"


def node_address() -> str:
    """Where other nodes reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def mark_own_cluster() -> None:
    """Notes that this Ray cluster was started for PyramidServe alone, on this machine."""
    ray_private.put(_OWN_CLUSTER, b"1")


def shard_address(host: str) -> str:
    """Where shards and router are to reach this process.

    Args:
        host: the setting ``shard_host``. Where it is empty, the node's address in Ray: nodes may come that
            are not there yet; but loopback while our own cluster has one node alone.
    """
    if host:
        return host
    nodes: list[dict[str, bool]] = ray.nodes()  # type: ignore[no-untyped-call]
    alone = sum(node["Alive"] for node in nodes) == 1
    return LOOPBACK if alone and ray_private.get(_OWN_CLUSTER) else node_address()


def interface_of(address: str) -> str:
    """The name of this node's network interface that has ``address``.

    Raises ConfigurationError where none has.
    """
    there = {
        each.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6)
    }
    if address not in there:
        raise ConfigurationError(
            f"shards are to be reached at {address!r}, but this node has {', '.join(sorted(there))}; set "
            "shard_host to one of those, or start Ray here with such a --node-ip-address"
        )
    return there[address]


def router_key() -> str:
    """Where the router of this replica's application announces its address."""
    return f"router/{serve.get_replica_context().app_name}"


def take_over_key(application: str) -> str:
    """There while the router of ``application`` is to listen beside one that has its port."""
    return f"pyramidserve/take-over/{application}"


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
        # Ours, as the store would listen on all interfaces; port 0, as any other may be taken.
        listening = socket.create_server((host, 0), family=_family(host))
        port, handle = listening.getsockname()[1], listening.detach()
        store = TCPStore(host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=handle)
        await asyncio.to_thread(announce, key, {"host": host, "port": port})
        return store
    async with asyncio.timeout(timeout_seconds):
        address = await look_up(key)
    return await asyncio.to_thread(
        TCPStore, str(address["host"]), int(address["port"]), size, False, timeout
    )


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
