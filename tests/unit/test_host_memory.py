"""A container's limit counts where it leaves less than the machine has."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from workers.host_memory import free_host_bytes

GIB = 1 << 30
SECOND = {"memory.max": f"{GIB}\n", "memory.current": "900\n", "memory.stat": "anon 1\ninactive_file 400\n"}
FIRST = {
    "memory/memory.limit_in_bytes": f"{GIB}\n",
    "memory/memory.usage_in_bytes": "900\n",
    "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 400\n",
}
MACHINE = 1 << 40


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, MACHINE),
        (SECOND, GIB - 500),
        (FIRST, GIB - 500),
        (SECOND | {"memory.max": "max\n"}, MACHINE),
        (FIRST | {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, MACHINE),
        (SECOND | {"memory.current": f"{2 * GIB}\n"}, 0),
        (SECOND | {"memory.max": "much\n"}, MACHINE),
    ],
)
def test_what_is_free_is_what_machine_and_container_leave(
    files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_bytes(tmp_path) == free
