"""The commands behind what is said of recall run, at a small size, and say what they are asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = r"[-+]?\d+(?:\.\d+)?"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("step --prompts 512 --texts 1", rf"512 tokens, step: NLL {NUMBER}"),
        ("facts --talks 2 --tokens 500", r"turn"),
        ("turns --tokens 500 --runs 1", r"turn"),
        ("exact --prompts 2 --tokens", r"2"),
        ("exact --prompts 0 --tokens 300 --sequences 2 --runs 1", r"300"),
    ],
)
def test_a_measurement_of_recall_runs(command: str, says: str, tmp_path: Path, embedded: Path) -> None:
    name, *options = command.split()
    output = tmp_path / "out.json"
    result = subprocess.run(
        [sys.executable, "-m", f"bench.recall.{name}", *options, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(says, result.stdout), result.stdout
    assert output.stat().st_size > 100
