"""Folders that appear whole or not at all."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` when it is complete.

    What goes wrong is an error only where no other process has made ``folder`` meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        try:
            yield made
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes other processes of this machine that want to fill ``folder`` wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
