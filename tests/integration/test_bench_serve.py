"""Chat traffic against a real cluster, as a user sends it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_process import RunningCluster

from cluster.load.trace import Session, Turn, write_trace
from pyramidserve.cli import main

pytest_plugins = ["cluster_fixtures"]


def test_sessions_are_played_and_told_of(
    toy_cluster: RunningCluster,
    toy: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = Session((Turn(20, 6, 0.1), Turn(5, 4, 0.1)))
    write_trace([session], tmp_path / "trace.json")
    options = ["--trace", tmp_path / "trace.json", "--rate", 6, 12, "--seconds", 5, "--warm-up", 1]
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    target = ["--target", toy_cluster.target, "--model", toy("gqa"), "--ttft", 2]
    assert main(["bench", "serve", *map(str, [*target, *options, *files])]) == 0
    said = capsys.readouterr().out
    assert "1 sessions, 2 turns" in said
    assert "highest rate within the objective: 12 turns/s" in said
    runs = json.loads((tmp_path / "out.json").read_text())
    assert [run["rate"] for run in runs] == [6, 12]
    for run in runs:
        assert run["turns_failed"] == {}
        assert run["turns_done"] > 0
        assert run["requests_per_second"] == pytest.approx(run["rate"], rel=0.6)
        assert run["output_tokens_per_second"] == pytest.approx(5 * run["requests_per_second"], rel=0.3)
        assert 0 < run["ttft_p50"] <= run["ttft_p99"] < 2
        assert len(run["series"]["moment"]) >= 5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    toy_cluster.check_empty()


def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--rate", "0"]) == 1
    assert "--rate [0.0]" in capsys.readouterr().err
    assert main(["bench", "serve", "--trace", "/nowhere.json"]) == 1
    assert "/nowhere.json" in capsys.readouterr().err
