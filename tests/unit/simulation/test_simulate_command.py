"""`pyramidserve simulate` as it is typed."""

import json
from pathlib import Path

import pytest
from test_calibration import written

from pyramidserve.cli import main


def test_clusters_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    times = ["--seconds", "20", "--warm-up", "5"]
    command = ["simulate", "--pipelines", "1", "2", "--rate", "2", *times, "--json", str(out)]
    assert main([*command, "--max-pipelines", "3", "--arrivals", "bursty"]) == 0
    told = json.loads(out.read_text())["results"]
    assert [each["pipelines"] for each in told] == [1, 2]
    assert all(each["turns_done"] > 10 and each["decisions_per_second"] > 0 for each in told)
    said = capsys.readouterr().out
    assert "2 pipelines of 1 GPUs, 7b" in said
    assert "as is usual; calibrate with --measured" in said


def test_a_calibration_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps(written()))
    assert main(["simulate", "--measured", str(file), "--check", str(file)]) == 0
    said = capsys.readouterr().out
    assert "median error" in said
    assert "measured    3.00 s" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--check", "x.json"], "--check needs --measured"),
        (["--rate", "0"], "rates must be finite"),
        (["--rate", "nan"], "rates must be finite"),
        (["--rate", "inf"], "rates must be finite"),
        (["--seconds", "10", "--warm-up", "6"], "shorter than the run"),
        (["--pipelines", "0"], "give 1 or more"),
        (["--pipelines", "4", "--max-pipelines", "2"], "no more than the maximum"),
        (["--shards", "33"], "7b can have 1 to 32"),
        (["--model", "70b", "--shards", "1"], "cannot hold the 138 GB"),
        (["--kv-keep", "2"], "kv_keep is 2.0"),
        (["--kv-keep", "0.5", "--kv-bytes-keep", "0.5"], "kv_keep 0.5 was given beside kv_bytes_keep 0.5"),
        (["--policy", "lru"], "--policy is 'lru', which is not installed; known are full"),
        (["--params", "none.json"], "none.json"),
        (["--measured", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_options_are_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *options]) != 0
    assert says in capsys.readouterr().err
