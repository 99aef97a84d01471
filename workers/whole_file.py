"""Files that are there as a whole, or as they were before."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Puts ``text`` in ``file`` as it is, at once. Raises OSError, and leaves the file as it was."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, newline="")
    os.replace(part, file)
