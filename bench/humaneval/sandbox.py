"""Programs in processes of their own that may compute, for a while, and nothing else.

It holds what models write by mistake. It is no wall against somebody who looks for a way out.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")
PASSED = b"passed"
# No network, and no process that outlives the first.
APART = ("unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")


def can_be_apart() -> bool:
    """Whether this machine lets a process have namespaces of its own."""
    try:
        return not subprocess.run([*APART, "true"], env={}, capture_output=True).returncode
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Sandbox:
    """Runs programs.

    Attributes:
        apart: in namespaces of their own; without, only Python's audit hooks keep them from the network.
        cpu_seconds: of each program.
        seconds: by the clock, where others may want the cores too.
        memory_bytes: of its addresses.
    """

    apart: bool
    cpu_seconds: int = 3
    seconds: float = 30.0
    memory_bytes: int = 512 << 20

    def passes(self, program: str) -> bool:
        """Whether ``program`` comes to its end, without an exception and within the limits."""
        limits = [str(self.cpu_seconds), str(self.memory_bytes)]
        command = [*(APART if self.apart else ()), sys.executable, "-I", "-S", "-B", str(CHILD), *limits]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as source:
            source.write(program.encode())
            source.seek(0)
            with subprocess.Popen(
                command,
                cwd=folder,
                env={},
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            ) as process:
                assert process.stdout is not None
                try:
                    # Something to read is the verdict, or the end of all that could give one.
                    ready, *_ = select.select([process.stdout], [], [], self.seconds)
                    return bool(ready) and os.read(process.stdout.fileno(), len(PASSED)) == PASSED
                finally:
                    os.killpg(process.pid, signal.SIGKILL)
