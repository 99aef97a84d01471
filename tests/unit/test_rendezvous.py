"""Where the processes of a gang reach each other."""

import asyncio
import socket
from typing import Any

import psutil
import pytest

from pyramidserve.errors import ConfigurationError
from pyramidserve.wire.connection import endpoint
from workers import rendezvous
from workers.rendezvous import interface_of, meet, shard_address

ALONE, TWO = [{"Alive": True}, {"Alive": False}], [{"Alive": True}, {"Alive": True}]


@pytest.mark.parametrize(
    ("host", "nodes", "own", "address"),
    [
        ("", TWO, False, "10.0.0.7"),
        ("", TWO, True, "10.0.0.7"),
        ("", ALONE, False, "10.0.0.7"),  # others may come
        ("", ALONE, True, "127.0.0.1"),
        ("10.0.0.9", ALONE, True, "10.0.0.9"),
        ("127.0.0.1", TWO, False, "127.0.0.1"),
    ],
)
def test_shards_are_reached_at_their_node_and_on_loopback_where_nobody_else_can_come(
    host: str, nodes: list[dict[str, bool]], own: bool, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr("workers.ray_private.get", lambda key: b"1" if own else None)
    assert shard_address(host) == address


def test_an_address_names_its_interface_and_another_the_way_out() -> None:
    for interface, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                assert interface_of(each.address) == interface
    with pytest.raises(ConfigurationError, match=r"'203\.0\.113\.1', but this node has .*shard_host"):
        interface_of("203.0.113.1")


def test_a_gangs_store_listens_at_its_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    async def look_up(key: str) -> dict[str, str | int]:
        while key not in told:
            await asyncio.sleep(0)
        found: dict[str, str | int] = told[key]
        return found

    monkeypatch.setattr(rendezvous, "announce", told.__setitem__)
    monkeypatch.setattr(rendezvous, "look_up", look_up)

    async def scenario() -> None:
        first, second = await asyncio.gather(
            meet("g", 0, 2, "127.0.0.1", 30.0), meet("g", 1, 2, "10.0.0.7", 30.0)
        )
        first.set("key", "value")
        assert second.get("key") == b"value"
        listening = [each for each in psutil.Process().net_connections() if each.status == "LISTEN"]
        (at,) = [each.laddr for each in listening if each.laddr.port == told["gang/g"]["port"]]
        assert at.ip == told["gang/g"]["host"] == "127.0.0.1"

    asyncio.run(scenario())


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert [endpoint("::1", 5), endpoint("a.b", 5), endpoint("10.0.0.7", 5)] == [
        "[::1]:5",
        "a.b:5",
        "10.0.0.7:5",
    ]
