"""What only a card can tell: its kernels, its tokens, and its way to the host."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.check import SECTIONS
from bench.gpu.context import Context


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kernels", "tokens", "moves"])
def test_a_card_says_and_keeps_what_it_should(name: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    context = Context(torch.device("cuda", 0), True, time.monotonic() + 200, tmp_path / "out.json")
    found: dict[str, Any] = {}
    with torch.inference_mode():
        SECTIONS[name](context, found)
    assert found["ok"], found
