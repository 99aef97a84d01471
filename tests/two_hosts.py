"""Two hosts with a node of one Ray cluster each: network namespaces of this machine, joined by a wire."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from cluster_process import eventually, free_port
from ray_head import RAY, end

# For tests alone (RFC 2544): of the wire between the hosts, and of the one from here to the first.
FIRST, SECOND, CLIENTS_OWN, FIRST_FOR_CLIENTS = "198.18.0.1", "198.18.0.2", "198.18.1.2", "198.18.1.1"
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray counts a node as dead that has not answered for so long.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
# A node ends where its agent is not there within some 15 s, as on a machine that has much to do.
STARTS, STARTED_SECONDS = 3, 90.0
OBJECT_STORE = f"--object-store-memory={100 << 20}"
NODE = (RAY, "start", "--block", "--num-cpus=1", "--num-gpus=0", OBJECT_STORE)


@dataclass
class Hosts:
    """A Ray cluster at ``address``; the router is to run on the first host."""

    address: str
    folder: Path
    namespaces: tuple[str, str]
    nodes: list[subprocess.Popen[bytes]]

    def on_first(self) -> tuple[str, ...]:
        """What a command begins with that is to run on the first host."""
        return ("ip", "netns", "exec", self.namespaces[0])

    def start_second(self) -> None:
        """Starts the second host's node."""
        self._start(1, f"--address={self.address}", f"--node-ip-address={SECOND}")

    def kill_second(self) -> None:
        """Kills all that runs on the second host: also a node that a cut wire has not cost its life."""
        while len(self.nodes) > 1:
            end(self.nodes.pop(), kill=True)

    def wire(self, state: str) -> None:
        """Puts the wire between the hosts "up" or "down"."""
        _ip("-n", self.namespaces[1], "link", "set", "wire", state)

    def _start(self, host: int, *arguments: str) -> None:
        for _ in range(STARTS):
            log = self.folder / f"node-{host}-{len(list(self.folder.glob('*.log')))}.log"
            with log.open("wb") as output:
                node = subprocess.Popen(
                    ["ip", "netns", "exec", self.namespaces[host], *NODE, *arguments],
                    env=os.environ | SETTINGS,
                    stdout=output,
                    stderr=output,
                )
            self.nodes.append(node)
            decided = partial(_has_decided, node, log)
            eventually(decided, f"no node came up: {log}", STARTED_SECONDS)
            if node.poll() is None:
                return
            end(self.nodes.pop(), kill=True)
        pytest.fail(f"no node came up: {log.read_text()}")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Fails where this machine or user may not make network namespaces."""
    namespaces = f"ps{os.getpid()}-1", f"ps{os.getpid()}-2"
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
    hosts = Hosts(f"{FIRST}:{free_port()}", folder, namespaces, [])
    try:
        _join(*namespaces)
        resources = f"--resources={json.dumps({'pyramidserve_router': 1})}"
        ports = (f"--port={hosts.address.split(':')[1]}", f"--ray-client-server-port={free_port()}")
        where = (f"--node-ip-address={FIRST}", f"--temp-dir={folder / 'ray'}", "--include-dashboard=false")
        hosts._start(0, "--head", *ports, *where, resources)
        hosts.start_second()
        yield hosts
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        for node in reversed(hosts.nodes):
            end(node)
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _join(first: str, second: str) -> None:
    clients = f"ps{os.getpid()}"
    for namespace in (first, second):
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second)
    _ip("link", "add", clients, "type", "veth", "peer", "name", "clients", "netns", first)
    _ip("addr", "add", f"{CLIENTS_OWN}/24", "dev", clients)
    _ip("link", "set", clients, "up")
    for namespace, interface, address in (
        (first, "wire", FIRST),
        (second, "wire", SECOND),
        (first, "clients", FIRST_FOR_CLIENTS),
    ):
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
        _ip("-n", namespace, "link", "set", interface, "up")


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.fail("a network namespace for each host needs the command ip (iproute2), which is not here")
    except subprocess.CalledProcessError as error:
        pytest.fail(
            f"a network namespace for each host cannot be made: `ip {' '.join(arguments)}` says "
            f"{error.stderr.strip()!r}; run the tests as root, on a kernel with namespaces and veth"
        )


def _has_decided(node: subprocess.Popen[bytes], log: Path) -> bool:
    return node.poll() is not None or b"Ray runtime started" in log.read_bytes()
