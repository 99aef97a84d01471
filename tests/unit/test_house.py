"""Imports go down the house, from room to room, and never up: ``docs/architecture.md`` draws it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
# From the top down; a file that stands alone is a room.
FLOORS = (
    "cluster.commands",
    "cluster.simulation",
    "cluster.load",
    "cluster.deploy",
    "cluster.app",
    "cluster.edge",
    "cluster.config",
    "cluster.http",
    "cluster.front",
    "cluster.route",
    "cluster.admit",
    "cluster.partition cluster.autoscale cluster.naming",
    "workers.bench workers.shard",
    "workers.head workers.hello",
    "workers.rendezvous workers.event_file",
    "workers.ray_private",
    "workers.engine",
    "workers.recall",
    "workers.execute",
    "workers.schedule",
    "workers.backends.cpu",
    "workers.backends",
    "workers.kv",
    "workers.policies",
    "workers.model",
    "workers.tools",
    "workers.budget",
    "workers.device",
    "workers.host_memory workers.events workers.overlap workers.percentile workers.tuning",
    "workers.whole_file",
    "pyramidserve.cli",
    "pyramidserve.commands",
    "pyramidserve",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def room_of(module: str) -> str:
    """The room that a module is in: the longest of those that its name begins with."""
    names = module.split(".")
    candidates = (".".join(names[:count]) for count in range(len(names), 0, -1))
    return next(name for name in candidates if name in FLOOR)


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("cluster", "workers", "pyramidserve")}


def arrows() -> set[tuple[str, str]]:
    """From which room to which there are imports."""
    files = [path for top in ("cluster", "workers", "pyramidserve") for path in (ROOT / top).rglob("*.py")]
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    drawn = {(room_of(module), room_of(name)) for path, module in modules.items() for name in imports(path)}
    return {(start, end) for start, end in drawn if start != end}


def test_imports_go_down() -> None:
    found = arrows()
    assert ("workers.engine", "workers.kv") in found
    assert {(start, end) for start, end in found if FLOOR[start] >= FLOOR[end]} == set()


def test_the_memory_knows_no_policy() -> None:
    assert {end for start, end in arrows() if start == "workers.kv"} <= {
        "workers.budget",
        "workers.device",
        "pyramidserve",
    }
