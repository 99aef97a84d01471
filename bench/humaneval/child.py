"""Runs the program on its standard input, and writes ``passed`` where that comes to its end.

``sandbox.py`` begins it as ``python -I -S -B child.py CPU_SECONDS MEMORY_BYTES``.
"""

import os
import resource
import sys
from typing import Any

REFUSED = ("ctypes.", "os.", "shutil.", "socket.", "subprocess.")
# Without these nothing can be imported.
ALLOWED = ("os.listdir", "os.scandir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises PermissionError at what is not computing: it also holds root, which some limits do not."""
    writes = event == "open" and bool(arguments[2] & WRITING)
    if writes or (event.startswith(REFUSED) and event not in ALLOWED):
        raise PermissionError(f"{event} {arguments!r:.200}")


def main() -> None:
    """Reads, lays down the limits, and runs."""
    cpu_seconds, memory_bytes = map(int, sys.argv[1:])
    program = sys.stdin.buffer.read().decode()
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for limit, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    sys.addaudithook(refuse)
    exec(compile(program, "program", "exec"), {})
    os.write(verdict, b"passed")
    os._exit(0)  # whatever it has left to be done at the end


main()
