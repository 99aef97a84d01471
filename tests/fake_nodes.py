"""A Ray cluster whose autoscaler adds and removes nodes, all of them processes of this machine."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from cluster_process import free_port
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray_head import RAY, end

TYPES = Path(__file__).parents[1] / "deploy" / "ray-cluster.yaml"
# Without tokens: it listens on loopback and lives as long as its test.
SETTINGS = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


@dataclass(frozen=True)
class Nodes:
    """A cluster at ``address``, with the process of its first node."""

    address: str
    head: psutil.Process

    def kill_under(self, worker: int) -> None:
        """Kills the node that the process ``worker`` runs on."""
        node = psutil.Process(worker).parent()
        assert node is not None
        assert node.name() == "raylet"
        node.kill()

    def added(self) -> int:
        """How many nodes there are beside the first."""
        names = []
        for process in self.head.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                names.append((process.name(), process.status()))
        running = [name for name, status in names if status != psutil.STATUS_ZOMBIE]
        return running.count("raylet") - 1


@contextmanager
def autoscaling_nodes(idle_minutes: float) -> Iterator[Nodes]:
    """A cluster of the node types in ``deploy/ray-cluster.yaml``; it begins with its head alone.

    ``idle_minutes``: after which the autoscaler takes a node away.
    """
    node_types: dict[str, Any] = yaml.safe_load(TYPES.read_text())["available_node_types"]
    for each in node_types.values():
        each["node_config"] = {}
    head: dict[str, float] = node_types.pop("head")["resources"]
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
    port = free_port()
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_autoscaler(f"127.0.0.1:{port}", head, node_types, idle_minutes)))
    others = {name: amount for name, amount in head.items() if name != "CPU"}
    command: list[str | Path] = [
        *(RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"),
        *(f"--autoscaling-config={config}", f"--temp-dir={folder}", "--include-dashboard=false"),
        *(f"--num-cpus={head['CPU']:g}", "--num-gpus=0", f"--resources={json.dumps(others)}"),
        *(f"--ray-client-server-port={free_port()}", f"--object-store-memory={100 << 20}"),
    ]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=log, stderr=log)
    try:
        try:
            yield Nodes(f"127.0.0.1:{port}", psutil.Process(process.pid))
        finally:
            end(process)
    except BaseException:
        print(f"Ray's logs are kept in {folder}")
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _autoscaler(
    address: str, head: dict[str, float], node_types: dict[str, Any], idle_minutes: float
) -> dict[str, Any]:
    nothing: dict[str, list[str]] = {
        name: []
        for name in (
            *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
            *("setup_commands", "head_setup_commands", "worker_setup_commands"),
            *("head_start_ray_commands", "worker_start_ray_commands"),
        )
    }
    return {
        "cluster_name": "fake",
        "max_workers": sum(each["max_workers"] for each in node_types.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "provider": {
            # By its path, as the defaults of "fake_multinode" are not in Ray's wheel.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": node_types
        | {FAKE_HEAD_NODE_TYPE: {"resources": head, "node_config": {}, "max_workers": 0}},
        **nothing,
    }
