"""What decides imports neither torch, ray nor grpc, not even by way of others."""

import subprocess
import sys
from pathlib import Path

import pytest

PURE = {
    "workers": "events percentile tuning whole_file",
    "workers.policies": "auto registry measured settled valid budget floors gates "
    "defensive kvzap pyramid streaming full",
    "workers.budget": "footprint forecast kv_share ledger pages plan released span",
    "workers.engine": "settings",
    "workers.backends": "tuning",
    "workers.bench": "cell intervals summary",
    "workers.execute": "tuning",
    "workers.schedule": (
        "accept capacity cohorts detokenizer drafts groups integrity memory parked phase receipt room "
        "roster scheduler sequence step steps tuning validation"
    ),
    "workers.kv": "page_table",
    "workers.model": "config shapes spans transcript work",
    "cluster": "autoscale config naming partition",
    "cluster.admit": "admission ledger lengths pace placement queue request sessions tuning",
    "cluster.deploy": "deployment guardian serve_names",
    "cluster.front": "tenants",
    "cluster.http": (
        "bodies chat_shape choice cluster_shape completion_shape constraints errors guard page pieces "
        "reply response_bodies response_items responses served unsupported"
    ),
    "cluster.route": "live pacer tuning",
    "cluster.load": "trace",
    "cluster.simulation": "pipeline prefills run sequence setup timing turn",
}
PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "grpc"):
            raise ImportError(f"{module} needs {name}")

sys.meta_path.insert(0, Refuse())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


@pytest.mark.parametrize("folder", PURE)
def test_a_core_needs_neither_tensors_nor_servers(folder: str) -> None:
    modules = [f"{folder}.{name}" for name in PURE[folder].split()]
    command, root = [sys.executable, "-c", PROGRAM, *modules], Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr[-1500:]
