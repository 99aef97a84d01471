"""The wheel's server side, installed where the project's folder is out of reach."""

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

from cluster_process import running_cluster

from pyramidserve import Client, Stopping


def test_a_gang_starts_from_another_working_directory(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    project = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, project],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # What [server] needs is lent from here, without the editable install: a listed path's own .pth
    # files are not followed.
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True
    )
    where = subprocess.run(
        [python, "-c", "import cluster; print(cluster.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(packages) in where.stdout
    with (
        running_cluster(
            tmp_path,
            environment / "bin" / "pyramidserve",
            model=str(toy("gqa")),
            dtype="float32",
            shards=2,
            kv_bytes=1 << 20,
            host_bytes=1 << 20,
            compression={"policy": "full"},
        ) as cluster,
        Client(cluster.target) as client,
    ):
        reply = client.generate("hello", stopping=Stopping(max_tokens=5, ignore_eos=True))
        assert len(reply.token_ids) == 5
