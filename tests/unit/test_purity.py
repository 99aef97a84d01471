"""What decides imports neither torch, ray nor grpc, not even by way of others."""

import subprocess
import sys
from pathlib import Path

import pytest

PURE = {
    "workers": "percentile",
    "workers.bench": "work",
    "workers.compression": "plan policies pyramid streaming",
    "workers.engine": (
        "accept cohorts detokenizer drafts memory parked scheduler sequence step steps validation"
    ),
    "workers.kv": "footprint forecast ledger page_table pages released",
    "workers.model": "config shapes transcript",
    "cluster": (
        "admission autoscale config ledger lengths live pacer partition placement queue request sessions tenants"
    ),
    "cluster.load": "trace",
    "cluster.simulation": "pipeline run setup timing turn",
}
PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "grpc"):
            raise ImportError(f"{sys.argv[1]} needs {name}")

sys.meta_path.insert(0, Refuse())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module", [f"{folder}.{name}" for folder, names in PURE.items() for name in names.split()]
)
def test_a_core_needs_neither_tensors_nor_servers(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, module],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-1500:]
