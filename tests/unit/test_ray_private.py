"""What Ray does not publish is used in one file, so that an upgrade is one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = ROOT / "workers" / "ray_private.py"


def private_imports(source: str) -> list[str]:
    """Names that ``source`` imports of Ray and that are not for everybody."""
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported += [f"{node.module}.{each.name}" for each in node.names]
    return [
        name
        for name in imported
        if name.startswith("ray.") and ("._" in name or name.startswith("ray.experimental."))
    ]


@pytest.mark.parametrize("folder", ["cluster", "workers"])
def test_what_ray_does_not_publish_is_used_in_one_file(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.py") if file != ALLOWED]
    assert {file: names for file in files if (names := private_imports(file.read_text()))} == {}


def test_that_file_would_be_found_out() -> None:
    assert "ray.serve.context._get_global_client" in private_imports(ALLOWED.read_text())
