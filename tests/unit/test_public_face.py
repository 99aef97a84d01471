"""What `import pyramidserve` gives, and what it costs."""

import importlib
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pyramidserve


def test_all_lists_what_is_there() -> None:
    offered = {
        name
        for name, value in vars(pyramidserve).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    offered -= {"version", "import_module", "Any", "TYPE_CHECKING"}
    for home, names in pyramidserve._HOMES.items():
        assert all(hasattr(importlib.import_module(f"pyramidserve.{home}"), name) for name in names)
        offered |= set(names)
    assert set(pyramidserve.__all__) == offered | {"__version__"}
    assert len(set(pyramidserve.__all__)) == len(pyramidserve.__all__)
    assert all(hasattr(pyramidserve, name) for name in pyramidserve.__all__)
    assert not hasattr(pyramidserve, "nothing_of_the_kind")


def test_the_engine_needs_neither_grpc_nor_an_installed_package() -> None:
    program = """
import sys
from importlib import metadata

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("grpc", "ray") or name.startswith("google.protobuf"):
            raise ImportError(name)

def no_version(name):
    if name == "pyramidserve":
        raise metadata.PackageNotFoundError(name)
    return known(name)

known, metadata.version = metadata.version, no_version
sys.meta_path.insert(0, Refuse())
import workers.engine.engine, workers.bench.measure
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_every_type_and_error_is_offered() -> None:
    for module in (pyramidserve.types, pyramidserve.errors):
        own = {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__.startswith(module.__name__)
        }
        assert own <= set(pyramidserve.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert pyramidserve.__version__ == version("pyramidserve")


def test_importing_loads_only_grpc_and_protobuf() -> None:
    program = (
        "import sys; before = set(sys.modules); import pyramidserve, pyramidserve.cli; "
        "pyramidserve.Client; "
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = result.stdout.split()
    assert "pyramidserve.client" in loaded
    # What grpc itself imports: its own companions where installed, and helpers of Cython.
    allowed = ("pyramidserve", "grpc", "google.protobuf", "google._upb", "typing_extensions")
    foreign = {
        name
        for name in loaded
        if not name.startswith(allowed)
        and "cython" not in name
        and name != "google"
        and name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert foreign == set()
