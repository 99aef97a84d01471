"""On a Ray cluster of others, with tokens: ours comes and goes, and theirs stays as it is."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster_process import free_port, run_serve, running_cluster, write_config
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray_head import ray_head

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
# An application that says which process it runs in, so that a restart shows.
THEIRS = """
import os
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Theirs:
    def __call__(self):
        return os.getpid()

app = Theirs.bind()
"""
# Joins, deploys theirs if it is to, and tells the process of each application that there is.
OTHERS = """
import json, sys, time
import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema
import theirs
from workers import ray_private

ray.init(address=sys.argv[1], log_to_driver=False)
if sys.argv[2] == "deploy":
    serve.start(proxy_location="Disabled")
    config = {"name": "from-a-file", "import_path": "theirs:app", "route_prefix": None}
    ray_private.deploy(ServeDeploySchema.model_validate({"applications": [config]}))
    serve.run(theirs.app, name="by-run", route_prefix=None)
    while serve.status().applications["from-a-file"].status != "RUNNING":
        time.sleep(0.1)
names = serve.status().applications
print(json.dumps({name: serve.get_app_handle(name).remote().result(timeout_s=30) for name in names}))
"""


def others(folder: Path, address: str, what: str) -> dict[str, int]:
    """The processes of all applications, once theirs are deployed if ``what`` is "deploy"."""
    told = subprocess.run(
        [sys.executable, "-c", OTHERS, address, what],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    processes: dict[str, int] = json.loads(told.stdout.splitlines()[-1])
    return processes


def certificate(folder: Path) -> dict[str, str]:
    """A certificate whose name is not this machine's, and its key."""
    files = {"tls_certificate": str(folder / "certificate.pem"), "tls_key": str(folder / "key.pem")}
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=llm.example", "-addext", "subjectAltName=DNS:llm.example"),
            *("-out", files["tls_certificate"], "-keyout", files["tls_key"]),
        ],
        check=True,
        capture_output=True,
    )
    return files


def is_healthy(target: str, certificate: str) -> bool:
    """As a client asks that knows the router by the name in its certificate."""
    trusted = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
    options = [("grpc.ssl_target_name_override", "llm.example")]
    with grpc.secure_channel(target, trusted, options) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def refusal(process: subprocess.Popen[str]) -> str:
    """What a `serve` says that cannot serve."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_ours_comes_and_goes_beside_theirs(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    for name, value in (TOKEN | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    tls = certificate(tmp_path)
    settings: dict[str, Any] = {"model": str(toy("gqa")), "dtype": "float32", "shards": 1, **tls}
    with ray_head({}) as address:
        theirs = others(tmp_path, address, "deploy")
        assert theirs.keys() == {"from-a-file", "by-run"}
        with running_cluster(tmp_path, address=address, **settings) as cluster:
            assert is_healthy(cluster.target, tls["tls_certificate"])
            again = write_config(tmp_path / "again.yaml", router_port=free_port(), **settings)
            assert "pyramidserve is deployed already" in refusal(
                run_serve(tmp_path, again, address=address)
            )
            too_much = settings | {"kv_bytes": 1 << 40}
            big = write_config(tmp_path / "big.yaml", router_port=free_port(), **too_much)
            big.write_text(big.read_text().replace("name: pyramidserve", "name: big"))
            assert "kv_bytes is 1099511627776" in refusal(run_serve(tmp_path, big, address=address))
            monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
            assert "RAY_AUTH_TOKEN" in refusal(run_serve(tmp_path, again, address=address))
            monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN["RAY_AUTH_TOKEN"])
            assert is_healthy(cluster.target, tls["tls_certificate"])
        assert others(tmp_path, address, "look") == theirs
