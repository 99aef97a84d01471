"""What the machine could do at best: its memory bandwidth and its matrix products."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from workers.bench.measure import Run
from workers.bench.workload import Workload
from workers.budget.plan import KeepPlan
from workers.device import synchronize
from workers.model.config import ModelConfig
from workers.model.work import Limits, prefill_flops, weights_read

READ_BYTES = 1 << 30
ROWS = 2048


@dataclass(frozen=True)
class Floor:
    """The least time, in seconds, of all prefills of a workload, of a decode step, and of the whole."""

    prefill: float
    decode_step: float
    whole: float


def machine_limits(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Limits:
    """Measures them, at the shape of the model's largest product, in ``dtype`` or fp32: the faster."""
    memory = torch.ones(READ_BYTES // 4, device=device)
    rates = [_flops_per_second(model, each, device) for each in {dtype, torch.float32}]
    return Limits(memory.nbytes / best_seconds(memory.sum, device), max(rates))


def floor(
    run: Run, workload: Workload, model: ModelConfig, plan: KeepPlan, limits: Limits, itemsize: int
) -> Floor:
    """The least time of ``run``, of whose prompts ``plan`` says what is computed and kept.

    Products and attention at the machine's rate; weights, and the KV that there was, read once a step.
    """
    prefill = workload.requests * prefill_flops(plan, model) / limits.flops_per_second
    weights = weights_read(model)
    steps = max(1, run.turns["decode"])
    rows = workload.requests * (workload.output - 1) / steps
    read = (weights * itemsize + run.kv_bytes_decoding) / limits.read_bytes_per_second
    step = max(read, 2 * weights * rows / limits.flops_per_second)
    return Floor(prefill, step, prefill + step * steps)


def _flops_per_second(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> float:
    weight = torch.randn(2 * model.intermediate, model.hidden, device=device).to(dtype)
    rows = torch.randn(ROWS, model.hidden, device=device).to(dtype)
    return 2 * ROWS * weight.numel() / best_seconds(partial(functional.linear, rows, weight), device)


def best_seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """The least time of so many, until ``device`` is done."""
    seconds = []
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
