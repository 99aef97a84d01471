"""The card by itself: what it is, and how fast it copies and multiplies."""

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch
from torch.nn import functional

from bench.gpu.context import Context
from workers.bench.roofline import best_seconds
from workers.model.shapes import SHAPES
from workers.model.work import Limits

# GB/s of so many bytes in the least time that something takes.
Rate = Callable[[float, Callable[[], object]], float]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
MODELS = ("llama-2-13b", "llama-2-7b")
# Rows of a product: of a decode step, and of prefill blocks.
ROWS = (32, 512, 2048, 8192)


def card(context: Context, results: dict[str, Any]) -> None:
    """What the machine is, its bandwidths in GB/s, its rates in TFLOP/s, and a launch in microseconds."""
    device, tiny = context.device, context.tiny
    results["machine"] = _machine(device)
    results["versions"] = {name: _version(name) for name in PACKAGES} | {"cuda": torch.version.cuda}

    def rate(size: float, work: Callable[[], object]) -> float:
        return round(size / best_seconds(work, device) / 1e9, 2)

    size = 16 << 20 if tiny else 4 << 30
    memory = torch.ones(size // 4, device=device)
    target = torch.empty_like(memory)
    results["read_gb_s"] = rate(size, memory.sum)
    # Counting what is read and what is written.
    results["copy_gb_s"] = rate(2 * size, partial(target.copy_, memory))
    del target
    context.flush()
    if device.type == "cuda":
        results["to_device_gb_s"], results["to_host_gb_s"] = _bus(memory[: 1 << 28], rate)
    del memory
    one = torch.ones(1, device=device)
    thousand = best_seconds(lambda: [one.add_(1) for _ in range(1000)], device)
    results["launch_us"] = round(thousand * 1e3, 2)
    results["products"] = {name: _products(name, context) for name in (("toy",) if tiny else MODELS)}


def limits(context: Context) -> Limits:
    """The card's limits, as ``card`` found them."""
    found = context.results["card"]
    (products, *_) = found["products"].values()
    best = max(each["tflop_s"] for each in products.values())
    return Limits(found["read_gb_s"] * 1e9, best * 1e12)


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": f"{platform.machine()} CPU", "cores": psutil.cpu_count(logical=False)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _bus(memory: torch.Tensor, rate: Rate) -> tuple[dict[str, float], dict[str, float]]:
    """GB/s from the host and to it, of pinned memory and of other."""
    there, back = {}, {}
    for kind in ("pinned", "pageable"):
        host = torch.zeros(memory.shape, pin_memory=kind == "pinned")
        there[kind] = rate(memory.nbytes, partial(memory.copy_, host, non_blocking=True))
        back[kind] = rate(memory.nbytes, partial(host.copy_, memory, non_blocking=True))
    return there, back


def _products(name: str, context: Context) -> dict[str, dict[str, float]]:
    """The largest product of a model, by rows: TFLOP/s, and GB/s of weights."""
    model, dtype = SHAPES[name], torch.float32 if context.tiny else torch.bfloat16
    weight = torch.randn(2 * model.intermediate, model.hidden, device=context.device).to(dtype)
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, model.hidden, device=context.device).to(dtype)
        seconds = best_seconds(partial(functional.linear, x, weight), context.device)
        found[str(rows)] = {
            "tflop_s": round(2 * rows * weight.numel() / seconds / 1e12, 3),
            "weights_gb_s": round(weight.nbytes / seconds / 1e9, 1),
        }
    return found
