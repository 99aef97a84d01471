"""Which floating point type and which kernels a shard uses."""

import logging

import torch

from pyramidserve.errors import ConfigurationError
from workers.backends import BACKENDS
from workers.backends.cpu.build import KernelBuildError, load_library
from workers.backends.cpu.native import NATIVE_DTYPES, CpuBackend
from workers.backends.interface import Backend
from workers.backends.reference import ReferenceBackend
from workers.backends.tuning import ReferenceTuning
from workers.budget.kv_format import KV_DTYPES, KV_FORMATS
from workers.device import multiplies_bf16
from workers.events import tell
from workers.kv.rows import WHOLE_WORDS, row_dtype, row_format

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


def choose_kv_dtype(
    name: str, dtype: torch.dtype, head_size: int, setting: str = "kv_dtype"
) -> torch.dtype:
    """The type of rows of KV that ``name``, one of KV_DTYPES, stands for beside weights of ``dtype``.

    Raises ConfigurationError where there is no such, or keys of ``head_size`` cannot be stored so.
    """
    if name not in KV_DTYPES:
        raise ConfigurationError(f"{setting} is {name!r}; it must be one of {', '.join(KV_DTYPES)}")
    if name == "auto":
        return dtype
    if KV_FORMATS[name].scale_bytes and head_size % WHOLE_WORDS:
        raise ConfigurationError(
            f"{setting} is {name!r}, but the model's heads have {head_size} numbers, which is no multiple "
            f"of {WHOLE_WORDS}; give 'auto'"
        )
    return row_dtype(name)


def choose_host_dtype(name: str, stored: torch.dtype, head_size: int) -> torch.dtype:
    """The type of rows on the host that ``name``, one of KV_DTYPES, stands for beside ``stored`` ones.

    Raises ConfigurationError as ``choose_kv_dtype``, and where they would have fewer bits.
    """
    dtype = choose_kv_dtype(name, stored, head_size, "host_kv_dtype")
    own, least = row_format(dtype), row_format(stored)
    if own.bits < least.bits:
        raise ConfigurationError(
            f"host_kv_dtype is {name!r}, but kv_dtype has {least.bits} bits, which what comes back would "
            "lack; give 'auto', or one that has as many"
        )
    return dtype


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, tuning: ReferenceTuning = ReferenceTuning()
) -> Backend:
    """The kernels of ``backend`` for tensors of ``dtype`` on ``device``; the log says which.

    "reference" is plain torch; "cpu" the compiled ones; "auto" the fastest that there are. Raises
    ConfigurationError for another name, and where "cpu" cannot be had.
    """
    if backend not in BACKENDS:
        raise ConfigurationError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    refusal = ""
    if backend != "reference":
        if device.type != "cpu" or dtype not in NATIVE_DTYPES:
            refusal = f"compiled kernels are for float32 and bfloat16 on cpu, not {dtype} on {device.type}"
        else:
            try:
                native = CpuBackend(load_library(), dtype, tuning)
            except KernelBuildError as error:
                refusal = str(error)
            else:
                tell(
                    logger,
                    logging.INFO,
                    "kernels_chosen",
                    backend="cpu",
                    dtype=str(dtype),
                    activations=str(native.activations),
                )
                return native
    if backend == "cpu":
        raise ConfigurationError(f"backend is 'cpu', but {refusal}; give 'auto' or 'reference'")
    slower = logging.WARNING if refusal and device.type == "cpu" else logging.INFO
    tell(
        logger,
        slower,
        "kernels_chosen",
        backend="reference",
        device=str(device),
        dtype=str(dtype),
        reason=refusal,
    )
    return ReferenceBackend(dtype, tuning, device)
