"""A package of others that brings policies, as an installer leaves it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers.policies.registry import ENTRY_POINTS, POLICIES, plan


@contextmanager
def installed_policies(folder: Path, module: str, code: str, named: Mapping[str, str]) -> Iterator[None]:
    """``module`` in ``folder``, with entry points to what is ``named`` in it; all is undone behind it."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:{attribute}\n" for name, attribute in named.items()]
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{''.join(lines)}")
    known = POLICIES.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        plan.cache_clear()
        yield
    POLICIES.clear()
    POLICIES.update(known)
    plan.cache_clear()
