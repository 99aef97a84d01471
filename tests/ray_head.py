"""A Ray cluster of one node that is not ours: it stays when what we serve on it goes."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from cluster_process import free_port

RAY = Path(sys.executable).parent / "ray"
STARTED_SECONDS = 60.0


@contextmanager
def ray_head(environment: Mapping[str, str]) -> Iterator[str]:
    """Its address. It has room for a router and a few shards.

    ``environment``: what its processes see beside this one's variables.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets need a short path
    port = free_port()
    command: list[str | Path] = [
        *(RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"),
        *(f"--temp-dir={folder}", "--include-dashboard=false", "--num-cpus=4", "--num-gpus=0"),
        *('--resources={"pyramidserve_router": 1}', f"--ray-client-server-port={free_port()}"),
        f"--object-store-memory={100 << 20}",
    ]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + STARTED_SECONDS
        while "Ray runtime started" not in (folder / "head.log").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((folder / "head.log").read_text())
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes], kill: bool = False) -> None:
    """Ends a node's processes, and no others; in order unless it is to ``kill`` them."""
    ours = [psutil.Process(process.pid)] if process.poll() is None else []
    ours += [each for parent in ours for each in parent.children(recursive=True)]
    if not kill:
        process.terminate()
        _, ours = psutil.wait_procs(ours, timeout=10)
    for each in ours:
        each.kill()
    psutil.wait_procs(ours, timeout=10)
    process.wait()
