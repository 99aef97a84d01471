"""What several test folders share: checkpoints, and engines on them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fuzz import FACTOR, examples
from hypothesis import settings
from toy import LIFT_AT_ONCE, write_toy

from workers.engine.engine import Engine, EngineConfig
from workers.execute.tuning import ExecuteTuning
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.config import read_config
from workers.policies.gates import Gates, features

SHARED_REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "pyramid_prefill.json"

# Chance has no say in whether a change may land; `make fuzz` looks further.
settings.register_profile(
    "project", max_examples=examples(100), derandomize=FACTOR == 1, deadline=None, print_blob=True
)
settings.load_profile("project")

# Toys are too small to share among threads, which would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A toy checkpoint by kind, written once."""
    written: dict[str, Path] = {}

    def checkpoint(kind: str = "gqa") -> Path:
        if kind not in written:
            written[kind] = write_toy(tmp_path_factory.mktemp(kind), kind)
        return written[kind]

    return checkpoint


@pytest.fixture(scope="module")
def embedded() -> Iterator[Path]:
    """The embedded model's folder; it is worth all cores of this process while it is in use."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    yield resolve_checkpoint(EMBEDDED)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_gates(
    toy: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A file of random gates for a toy, by kind."""
    folder = tmp_path_factory.mktemp("gates")

    def file(kind: str = "gqa") -> Path:
        model = read_config(toy(kind))
        size = features(torch.zeros(1, 2, model.head_size)).shape[1]
        draw = torch.Generator().manual_seed(5)
        weights = torch.randn(model.layers, model.kv_heads, size, generator=draw)
        Gates(model.fingerprint, weights.numpy()).write(folder / kind)
        return folder / kind

    return file


@pytest.fixture(scope="session")
def toy_engine(toy: Callable[[str], Path], toy_gates: Callable[[str], Path]) -> Callable[..., Engine]:
    """An engine on a toy, by kind, shards, dtypes and rows of a block; built once, empty between tests."""
    built: dict[tuple[str, int, str, int, str], Engine] = {}

    def engine(
        kind: str = "gqa",
        shards: int = 1,
        dtype: str = "float32",
        block_rows: int = 512,
        kv_dtype: str = "auto",
    ) -> Engine:
        key = (kind, shards, dtype, block_rows, kv_dtype)
        if key not in built:
            boundaries = {1: (), 2: (2,), 3: (1, 4)}[shards]
            built[key] = Engine(
                EngineConfig(
                    checkpoint=str(toy(kind)),
                    dtype=dtype,
                    kv_dtype=kv_dtype,
                    gates=str(toy_gates(kind)),
                    boundaries=boundaries,
                    kv_bytes=8 << 20,
                    host_bytes=8 << 20,
                    max_sequences=16,
                    max_prefill_tokens=256,
                    schedule=LIFT_AT_ONCE,
                    execute=ExecuteTuning(block_rows=block_rows),
                )
            )
        return built[key]

    return engine


@pytest.fixture
def reference_file() -> Path:
    """The recordings of the authors' code; skips where a checkout has none beside it."""
    if not SHARED_REFERENCE.is_file():
        pytest.skip(f"{SHARED_REFERENCE} is not there: recordings of the authors' code")
    return SHARED_REFERENCE
