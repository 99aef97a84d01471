"""Commands behind what is said of recall run, at a small size, and say what they are asked for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("step --prompts 300 --texts 1 --goes-on 32", r"300 tokens, step: NLL \d"),
        ("facts --talks 1 --tokens 300", r"evict turn .* recovers"),
    ],
)
def test_a_measurement_of_recall_runs(command: str, says: str, tmp_path: Path, embedded: Path) -> None:
    name, *options = command.split()
    output = tmp_path / "out.json"
    run = [sys.executable, "-m", f"bench.recall.{name}", *options, "--output", str(output)]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(says, result.stdout), result.stdout
    assert json.loads(output.read_text())
