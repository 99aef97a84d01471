"""The device that a shard computes on: its memory, its types, and the way to it."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from pyramidserve.errors import ConfigurationError
from workers.host_memory import free_host_bytes

# The first kind of NVIDIA GPU whose tensor cores multiply bfloat16: Ampere.
_MULTIPLIES_BF16 = (8, 0)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that torch's allocator has handed out, now and at most so far; 0 of the host's."""

    allocated: int = 0
    peak: int = 0


def open_device(name: str) -> torch.device:
    """The device that torch calls ``name``, made this thread's own.

    Raises ConfigurationError when there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device is {name!r}, which torch does not know; give 'cpu' or 'cuda'"
        ) from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device is {name!r}, but torch {torch.__version__} finds no CUDA device; install a CUDA "
            "build of torch and see that nvidia-smi lists a GPU, or give 'cpu'"
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ConfigurationError(f"device is {name!r}, but there are {count} CUDA devices, from cuda:0 on")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    # cuDNN's attention is compiled for every new shape, for tens of milliseconds: each prompt has its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def device_of_rank(name: str, rank: int) -> str:
    """What "cuda" means to a shard: of the GPUs that its process sees, one for each rank in turn."""
    if name != "cuda" or not torch.cuda.is_available():
        return name
    return f"cuda:{rank % torch.cuda.device_count()}"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether ``device`` has bfloat16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _MULTIPLIES_BF16
    native = torch.cpu.get_capabilities()
    return bool(native.get("avx512_bf16") or native.get("amx_bf16"))


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that nobody has taken, or that torch's allocator keeps for this process."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return free_host_bytes()


def device_memory(device: torch.device) -> DeviceMemory:
    """What torch's allocator has handed out of ``device``, by all that this process does there."""
    if device.type != "cuda":
        return DeviceMemory()
    handed_out = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
    return DeviceMemory(handed_out["current"], handed_out["peak"])


def allocator_retries(device: torch.device) -> int:
    """How often so far torch's allocator gave all back that it kept, to find room: a stop of the device."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"])


def synchronize(device: torch.device) -> None:
    """Returns when ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(values: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` on ``device``, where nothing waits for the copy but what comes behind it there.

    They must not be changed any more: in host memory they are the same memory.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From memory that is not pinned, CUDA copies only once all that was begun before is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def select_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]``, pinned where ``rows`` is, so that a GPU reaches it as fast."""
    pinned = rows.device.type == "cpu" and rows.is_pinned()
    shape = (len(index), *rows.shape[1:])
    out = torch.empty(shape, dtype=rows.dtype, device=rows.device, pin_memory=pinned)
    return torch.index_select(rows, 0, index, out=out)
