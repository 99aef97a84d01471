"""A new deployment takes the place of the old one under load, and no stream is lost."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_process import PYRAMIDSERVE, eventually, free_port, running_cluster, write_config
from openai import OpenAI

from pyramidserve import Client, Reply, Stopping

LONG = Stopping(max_tokens=150, ignore_eos=True)
PROMPT = list(range(3, 103))
# They think between two replies, as what is rolled out wants the cores too.
USERS, THINKING_SECONDS = 3, 1.0
DEPLOY = """
import sys, time
from pathlib import Path
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from workers import ray_private

ray_private.use_token_as(sys.argv[1])
ray.init(address=sys.argv[1], log_to_driver=False)
ray_private.deploy(ServeDeploySchema.model_validate(yaml.safe_load(Path(sys.argv[2]).read_text())))
while any(each.status != "RUNNING" for each in serve.status().applications.values()):
    time.sleep(0.1)
print(*serve.status().applications)
"""


def roll_out(config: Path, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [PYRAMIDSERVE, "rollout", "--config", config, "--address", address]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def deploy(config: Path, address: str, folder: Path) -> list[str]:
    """Does what `serve deploy` does; returns the names of all applications once all of them run."""
    command: list[str | Path] = [sys.executable, "-c", DEPLOY, address, config]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    return told.stdout.split()


@pytest.mark.timeout(900)
def test_a_rollout_loses_no_stream(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    settings: dict[str, Any] = {
        "model": str(toy("gqa")),
        "dtype": "float32",
        "shards": 2,
        "cpus_per_shard": 0.25,
        "kv_bytes": 2_000_000,
        "compression": {"policy": "full"},
        "http_port": free_port(),
        "served_model_name": "toy",
    }
    over = threading.Event()
    with running_cluster(tmp_path, **settings) as cluster, ThreadPoolExecutor(USERS + 1) as users:

        def pages() -> set[int]:
            stages = [stage for each in cluster.state().pipelines for stage in each.stages]
            return {stage.pages_total for stage in stages}

        def use(user: int) -> list[Reply]:
            replies: list[Reply] = []
            while not over.wait(THINKING_SECONDS):
                with Client(cluster.target) as client:
                    name = f"{user}-{len(replies)}"
                    replies.append(client.generate(PROMPT, request_id=name, stopping=LONG))
            return replies

        def use_http() -> list[str]:
            said: list[str] = []
            with OpenAI(base_url=f"{cluster.http}/v1", api_key="any", max_retries=8) as client:
                while not over.wait(THINKING_SECONDS):
                    reply = client.completions.create(
                        model="toy", prompt=PROMPT, max_tokens=30, extra_body={"ignore_eos": True}
                    )
                    said.append(reply.choices[0].text)
            return said

        def new_config(**changes: Any) -> Path:
            port = int(cluster.target.rpartition(":")[2])
            return write_config(tmp_path / "new.yaml", router_port=port, **settings | changes)

        (before,) = pages()
        using = [users.submit(use, user) for user in range(USERS)]
        by_http = users.submit(use_http)
        try:
            failed = roll_out(new_config(kv_bytes=1), cluster.ray, tmp_path)
            assert failed.returncode != 0
            assert "kv_bytes is 1" in failed.stderr
            assert pages() == {before}
            done = roll_out(new_config(kv_bytes=4_000_000), cluster.ray, tmp_path)
            assert done.returncode == 0, done.stderr
            eventually(lambda: len(pages()) == 1 and before not in pages(), "the old one still serves")
            assert not by_http.done()
            assert not any(user.done() for user in using)
            deployed = {stage.pid for each in cluster.state().pipelines for stage in each.stages}
            assert deploy(new_config(kv_bytes=4_000_000), cluster.ray, tmp_path) == ["pyramidserve"]
            assert {stage.pid for each in cluster.state().pipelines for stage in each.stages} == deployed
        finally:
            over.set()
        replies = [reply for user in using for reply in user.result()]
        texts = by_http.result()
        assert len(texts) > 1
        assert set(texts) == {texts[0]}
        # The old one, the stand-in and the new one; nothing may have ended on one that came and went.
        assert 2 <= len({reply.receipt.pipeline_id for reply in replies}) <= 3
        assert {reply.token_ids for reply in replies} == {replies[0].token_ids}
        assert all(len(reply.token_ids) == 150 for reply in replies)
        cluster.check_empty()
