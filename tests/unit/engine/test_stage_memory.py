"""A shard that its machine has no memory for says which setting is too much."""

import pytest
import torch

from pyramidserve.errors import ConfigurationError
from workers.budget.footprint import ShardLayout
from workers.engine import stage_memory
from workers.engine.settings import EngineSettings
from workers.engine.stage_memory import check_room

LAYOUT = ShardLayout(0, 2, 4096)


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 1,000,000 bytes free, and a card with 100,000."""
    monkeypatch.setattr(
        stage_memory, "free_bytes", lambda device: 1_000_000 if device.type == "cpu" else 100_000
    )


@pytest.mark.parametrize(
    ("device", "kv_bytes", "host_bytes", "says"),
    [
        ("cpu", 8_191, 0, "kv_bytes is 8191, less than a page"),
        ("cpu", 990_001, 0, "kv_bytes is 990001, .* cpu has 1000000 bytes free"),
        ("cpu", 500_000, 490_001, "host_bytes is 490001, but the host has 490000 .* give at most 490000"),
        ("cuda", 90_001, 0, "kv_bytes is 90001, .* cuda has 100000 bytes free"),
        ("cuda", 90_000, 1_000_001, "host_bytes is 1000001, but the host has 1000000 bytes free; give"),
    ],
)
def test_what_does_not_fit_is_named(device: str, kv_bytes: int, host_bytes: int, says: str) -> None:
    settings = EngineSettings(kv_bytes=kv_bytes, host_bytes=host_bytes)
    with pytest.raises(ConfigurationError, match=says):
        check_room(settings, LAYOUT, torch.device(device), 10_000)


def test_what_fits_is_taken() -> None:
    check_room(EngineSettings(kv_bytes=500_000, host_bytes=490_000), LAYOUT, torch.device("cpu"), 10_000)
    check_room(EngineSettings(kv_bytes=90_000, host_bytes=1_000_000), LAYOUT, torch.device("cuda"), 10_000)
