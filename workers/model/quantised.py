"""Weights that lie in a checkpoint as 8-bit numbers with scales, as plain numbers.

Every form here is a number times a scale, of which there is one a tensor, a row or a block:

- FP8 (``quant_method`` fp8, fbgemm_fp8, modelopt; compressed-tensors' float-quantized): ``weight_scale``,
  or ``weight_scale_inv``, which is multiplied by too (DeepSeek-V3's ``weight_block_size``);
- int8 (compressed-tensors' int-quantized): ``weight_scale``;
- int8 (bitsandbytes): ``SCB``, the largest magnitude of each row, which 127 stands for.

Scales of activations are not needed: activations are not quantised here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyramidserve.errors import CheckpointError

# What is beside ``X.weight`` under this name, and what it is multiplied by.
SCALES = {"weight_scale": 1.0, "weight_scale_inv": 1.0, "SCB": 1 / 127}
# What else is beside it, and says nothing of the weights' values.
WITHOUT_VALUE = ("input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
METHODS = "FP8 per tensor, row or block, symmetric int8 of compressed-tensors, and bitsandbytes int8"

Block = tuple[int, int]


def scale_blocks(quantisation: Mapping[str, Any] | None) -> Block | None:
    """Rows and columns that share a scale, where the ``quantization_config`` of a checkpoint says so.

    Raises CheckpointError, naming the method, unless weights can be read as numbers times scales.
    """
    if quantisation is None:
        return None
    method = str(quantisation.get("quant_method"))
    kind = {
        "compressed-tensors": quantisation.get("format"),
        "modelopt": quantisation.get("quant_algo"),
        "bitsandbytes": "8 bits" if quantisation.get("load_in_8bit") else "4 bits",
    }.get(method)
    readable = {
        "fp8": (None,),
        "fbgemm_fp8": (None,),
        "compressed-tensors": ("float-quantized", "int-quantized", "naive-quantized"),
        "modelopt": ("FP8",),
        "bitsandbytes": ("8 bits",),
    }
    if kind not in readable.get(method, ()):
        named = method if kind is None else f"{method} ({kind})"
        raise CheckpointError(
            f"the weights are quantised by {named}, which cannot be read; "
            f"give a checkpoint in bfloat16 or float16, or quantised as {METHODS}"
        )
    block = quantisation.get("weight_block_size")
    return None if block is None else (int(block[0]), int(block[1]))


def scale_of(name: str, there: Callable[[str], bool]) -> str | None:
    """The name of the scale of tensor ``name``, if one is ``there``."""
    stem = name.removesuffix("weight")
    return next((stem + scale for scale in SCALES if there(stem + scale)), None)


def dequantised(name: str, numbers: torch.Tensor, scale: torch.Tensor, block: Block | None) -> torch.Tensor:
    """``numbers`` [rows, columns] times the ``scale`` ``name`` of each, fp32.

    Args:
        scale: one number, or one a row, or [blocks of rows, blocks of columns].
        block: rows and columns of a block; None: as many as divide the tensor evenly.

    Raises CheckpointError when the shapes do not fit.
    """
    factor = scale.float() * SCALES[name.rsplit(".", 1)[1]]
    factor = factor.reshape(-1, 1) if factor.dim() < 2 else factor
    rows, columns = numbers.shape
    if factor.shape not in ((1, 1), (rows, 1)):
        high, wide = block or (rows // len(factor), columns // factor.shape[1])
        covered = (-(-rows // high), -(-columns // wide)) if high and wide else ()
        if factor.shape != covered:
            raise CheckpointError(
                f"scale {name!r} has shape {tuple(scale.shape)}, which does not fit weights of "
                f"{rows} x {columns}" + (f" in blocks of {block[0]} x {block[1]}" if block else "")
            )
        factor = factor.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return numbers.float() * factor
