"""Real clusters for the tests: `pyramidserve serve` as a user starts it."""

import itertools
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyramidserve import Client, ClusterState, Reply, UnavailableError

READY_SECONDS = 150.0
# What is waited for needs the cores more than whoever waits.
ASKING_INTERVAL = 0.02
PYRAMIDSERVE = Path(sys.executable).parent / "pyramidserve"


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that serves at ``target``, on the Ray cluster at ``ray``; ``lines``: what it has said.

    ``http``: where OpenAI's API is, if it is anywhere.
    """

    target: str
    ray: str
    lines: list[str]
    http: str = ""

    def state(self) -> ClusterState:
        with Client(self.target) as client:
            return client.cluster_state()

    def check_empty(self) -> None:
        """Waits until nothing is queued, running, reserved, in use or spilled, or fails."""
        eventually(lambda: is_empty(self.state()), "the cluster is not empty")


def is_empty(state: ClusterState) -> bool:
    """Whether no request has left anything behind."""
    return (
        state.queued == state.running == 0
        and bool(state.pipelines)
        and all(pipeline.sequences == 0 for pipeline in state.pipelines)
        and all(
            stage.pages_in_use == stage.pages_reserved == stage.host_bytes == 0
            for pipeline in state.pipelines
            for stage in pipeline.stages
        )
    )


def eventually(holds: Callable[[], bool], otherwise: str, seconds: float = 60.0) -> None:
    """Asks again and again until ``holds``, or fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except UnavailableError:
            pass
        time.sleep(ASKING_INTERVAL)
    pytest.fail(otherwise)


@contextmanager
def many_users(ask: Callable[[int], Reply]) -> Iterator[list[Reply]]:
    """Users who ``ask`` again and again, several times what a gang has room for, until the block ends.

    Yields the replies so far; behind the block they are all there.
    """
    over, replies, numbers = threading.Event(), list[Reply](), itertools.count()

    def use() -> None:
        while not over.is_set():
            replies.append(ask(next(numbers)))

    with ThreadPoolExecutor(40) as users:
        using = [users.submit(use) for _ in range(40)]
        try:
            yield replies
        finally:
            over.set()
        for user in using:
            user.result()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def write_config(file: Path, **settings: Any) -> Path:
    """Writes a Serve config file with these settings of ours."""
    application = {
        "name": "pyramidserve",
        "import_path": "cluster.app:build",
        "route_prefix": None,
        "args": {"cpus_per_shard": 0.5, "http_port": 0, "metrics_port": 0, **settings},
    }
    file.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
    return file


def run_serve(
    folder: Path,
    config: Path,
    program: Path = PYRAMIDSERVE,
    address: str = "",
    prefix: Sequence[str] = (),
    options: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Starts `pyramidserve serve` in ``folder``, which is not the project's."""
    return subprocess.Popen(
        [*prefix, program, "serve", "--config", config, "--address", address, *options],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running_cluster(
    folder: Path,
    program: Path = PYRAMIDSERVE,
    address: str = "",
    prefix: Sequence[str] = (),
    reached_at: str = "127.0.0.1",
    options: Sequence[str] = (),
    **settings: Any,
) -> Iterator[RunningCluster]:
    """A cluster with these settings; it is shut down in order at the end.

    Args:
        address: of the Ray cluster that it is to run on; "": its own.
        prefix: of the command, as "ip netns exec" that runs it on another host.
        reached_at: where clients of here find the router's host.
        options: of `pyramidserve serve`, beside those.
    """
    port = free_port()
    config = write_config(folder / f"serve-{port}.yaml", router_port=port, **settings)
    process = run_serve(folder, config, program, address, prefix, options)
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    timer = threading.Timer(READY_SECONDS, process.kill)
    timer.start()
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "serving at" in line:
                break
        else:
            pytest.fail("the cluster did not come up:\n" + "".join(lines))
        timer.cancel()
        (ray,) = re.findall(r"on the Ray cluster at (\S+);", "".join(lines))
        reader.start()
        http = f"http://{reached_at}:{settings['http_port']}" if settings.get("http_port") else ""
        yield RunningCluster(f"{reached_at}:{port}", ray, lines, http)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        timer.cancel()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        if reader.ident is not None:
            reader.join()
        process.stderr.close()
