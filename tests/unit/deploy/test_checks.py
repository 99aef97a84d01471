"""What a machine does not have is said before anything starts."""

import socket

import pytest

from cluster.config import ClusterConfig
from cluster.deploy.checks import check_files, check_memory, check_resources
from cluster.deploy.serving import the_only_one
from cluster.edge.server import port_problem
from pyramidserve.errors import ConfigurationError, UnschedulableError
from workers import ray_private

TIB = 1 << 40


@pytest.mark.parametrize(
    "settings", [{"kv_bytes": TIB}, {"host_bytes": TIB}, {"host_bytes": 32 * TIB, "device": "cuda"}]
)
def test_pools_that_this_machine_has_no_memory_for_are_named(settings: dict[str, int]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"lower kv_bytes, host_bytes, shards or pipelines"
    ) as raised:
        check_memory(ClusterConfig(**settings))  # type: ignore[arg-type]
    assert str(settings.get("kv_bytes", settings.get("host_bytes"))) in raised.value.message


def test_budgets_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"budgets 'none\.json' cannot be read"):
        check_files(ClusterConfig(budgets="none.json"), lambda _: None)


def test_pools_are_counted_together() -> None:
    one = ClusterConfig(shards=1, kv_bytes=1 << 28)
    check_memory(one)
    with pytest.raises(ConfigurationError, match="4096 shards want 268435456 bytes of kv_bytes"):
        check_memory(ClusterConfig(shards=4, pipelines=1024, kv_bytes=1 << 28))


def test_what_lies_on_a_device_of_its_own_is_not_the_machines() -> None:
    check_memory(ClusterConfig(kv_bytes=TIB, device="cuda", host_bytes=0))


def test_a_resource_that_is_short_is_named() -> None:
    with pytest.raises(UnschedulableError, match="need 2 CPU, the cluster has 1"):
        check_resources(ClusterConfig(), {"CPU": 1.0})


@pytest.mark.parametrize(
    ("found", "says"),
    [((), "none runs here"), (("10.0.0.2:6379", "10.0.0.1:6379"), "10.0.0.1:6379, 10.0.0.2:6379")],
)
def test_which_ray_cluster_is_meant_is_asked_unless_there_is_one(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...], says: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_private, "clusters_here", lambda: frozenset(found))
    with pytest.raises(ConfigurationError, match=f"{says}; give its --address"):
        the_only_one()
    monkeypatch.setattr(ray_private, "clusters_here", lambda: frozenset(["10.0.0.1:6379"]))
    assert the_only_one() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert the_only_one() == "10.0.0.9:6379"


def test_a_port_on_which_somebody_listens_is_not_free() -> None:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        problem = port_problem("127.0.0.1", port)
        assert problem is not None
        assert "in use" in problem
    assert port_problem("127.0.0.1", port) is None


def test_an_address_that_is_not_ours_is_a_problem() -> None:
    assert port_problem("192.0.2.77", 0) is not None
