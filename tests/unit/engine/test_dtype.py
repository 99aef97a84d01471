"""The floating point type that "auto" stands for."""

import pytest
import torch

from workers.model.dtype import choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("native", "chosen"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_multiplies_it(
    native: dict[str, bool], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native)
    assert choose_dtype("auto", CPU) is chosen


def test_a_type_by_name_is_obeyed() -> None:
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert choose_dtype("float32", CPU) is torch.float32
