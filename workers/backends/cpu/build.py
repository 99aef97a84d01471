"""Compiles the native kernels, once for each kind of processor."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from workers.backends.cpu.shared import MACROS
from workers.model.checkpoint import cache_folder

SOURCE = Path(__file__).with_name("source")
# No flag that changes what infinities mean: the softmax starts from one.
FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -fPIC -shared"
COMPILE_SECONDS = 300


class KernelBuildError(Exception):
    """There is no compiler, or it refuses the kernels."""


def load_library() -> ctypes.CDLL:
    """The kernels' library, compiled if this processor has not seen it yet. Raises KernelBuildError."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    sources = [path.read_text() for path in sorted(SOURCE.iterdir())]
    identity = (sources, compiler, FLAGS, MACROS, sorted(torch.cpu.get_capabilities().items()))
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"{name}.so"
    try:
        if not library.is_file():
            _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelBuildError(f"{shlex.join(compiler)}: {error}") from error


def _compile(compiler: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        sources = map(str, sorted(SOURCE.glob("*.c")))
        macros = [f"-D{name}={value}" for name, value in MACROS.items()]
        command = [*compiler, *FLAGS.split(), *macros, *sources, "-o", str(built), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = str(error.stderr or error).strip().splitlines()
            raise KernelBuildError(f"{shlex.join(command)}: {said[-1] if said else error}") from error
        built.rename(library)
