"""Weights of 8 bits with scales are read as the numbers that they stand for, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyramidserve.errors import CheckpointError
from workers.model.quantised import dequantised, scale_blocks


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_a_tensor(shape: tuple[int, ...]) -> None:
    numbers, scale = _fp8(torch.randn(6, 8), torch.tensor(0.01)), torch.full(shape, 0.01)
    torch.testing.assert_close(dequantised("q.weight_scale", numbers, scale, None), numbers.float() * 0.01)


@pytest.mark.parametrize("reshape", [torch.Tensor.flatten, lambda scale: scale[:, None]])
def test_one_scale_a_row(reshape: Callable[[torch.Tensor], torch.Tensor]) -> None:
    numbers, scale = torch.randint(-127, 128, (6, 8), dtype=torch.int8), torch.rand(6)
    expected = numbers.float() * scale[:, None]
    torch.testing.assert_close(dequantised("q.weight_scale", numbers, reshape(scale), None), expected)
    torch.testing.assert_close(dequantised("q.SCB", numbers, reshape(scale), None), expected / 127)


@pytest.mark.parametrize(("rows", "columns", "block"), [(8, 12, None), (8, 12, (4, 4)), (7, 10, (4, 4))])
def test_one_scale_a_block(rows: int, columns: int, block: tuple[int, int] | None) -> None:
    numbers, scale = _fp8(torch.randn(rows, columns), torch.tensor(0.01)), torch.rand(2, 3)
    found = dequantised("q.weight_scale_inv", numbers, scale, block)
    for row in range(rows):
        for column in range(columns):
            assert found[row, column] == numbers[row, column].float() * scale[row // 4, column // 4]


@pytest.mark.parametrize("shape", [(5,), (3, 3), (2, 2)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        CheckpointError, match=r"scale 'q.weight_scale' has shape .* 8 x 12 in blocks of 4 x 4"
    ):
        dequantised("q.weight_scale", torch.zeros(8, 12, dtype=torch.int8), torch.ones(shape), (4, 4))


@pytest.mark.parametrize(
    ("told", "blocks"),
    [
        (None, None),
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128)),
        ({"quant_method": "fbgemm_fp8"}, None),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, None),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None),
    ],
)
def test_methods_that_are_read(told: dict[str, Any] | None, blocks: tuple[int, int] | None) -> None:
    assert scale_blocks(told) == blocks


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4 bits"),
        ({"bits": 4}, "None"),
    ],
)
def test_other_methods_are_refused_by_name(told: dict[str, Any], named: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"quantised by .*{named}.*cannot be read.*give a checkpoint in"
    ):
        scale_blocks(told)
