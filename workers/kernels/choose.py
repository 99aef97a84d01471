"""Which floating point type and which kernels a shard uses."""

import logging

import torch

from workers.device import multiplies_bf16
from workers.kernels.build import KernelBuildError, load_library
from workers.kernels.interface import Kernels
from workers.kernels.native import NATIVE_DTYPES, NativeKernels
from workers.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that ``name``, one of DTYPES, stands for on ``device``.

    "auto" is bfloat16 where that is fast: where the hardware multiplies it, or where the native kernels,
    which store bfloat16 and compute in float32, can be had. Else it is float32, on a GPU float16.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if multiplies_bf16(device):
        return torch.bfloat16
    if device.type == "cuda":
        return torch.float16
    try:
        load_library()
    except KernelBuildError:
        return torch.float32
    return torch.bfloat16


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels there are for tensors of ``dtype`` on ``device``; the log says which and why."""
    if device.type != "cpu" or dtype not in NATIVE_DTYPES:
        logger.info("kernels_chosen backend=torch device=%s dtype=%s", device.type, dtype)
        return TorchKernels(dtype)
    try:
        native = NativeKernels(load_library(), dtype)
    except KernelBuildError as error:
        logger.warning("kernels_chosen backend=torch reason=%r: decoding is slower", str(error))
        return TorchKernels(dtype)
    logger.info(
        "kernels_chosen backend=native device=cpu dtype=%s activations=%s", dtype, native.activations
    )
    return native
