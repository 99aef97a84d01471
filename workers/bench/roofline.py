"""What the machine could do at best: its memory bandwidth and its matrix products."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from workers.bench.measure import Run
from workers.bench.workload import Workload
from workers.model.config import ModelConfig

READ_BYTES = 512 << 20
ROWS = (16, 2048)


@dataclass(frozen=True)
class Limits:
    """Bytes read a second, and floating point operations a second in products of few and many rows."""

    read_bytes_per_second: float
    few_rows_flops_per_second: float
    many_rows_flops_per_second: float


def machine_limits(model: ModelConfig, dtype: torch.dtype) -> Limits:
    """Measures them, at the shape of the model's largest product, in ``dtype`` or fp32: the faster."""
    memory = torch.ones(READ_BYTES // 4)
    rates = [max(_flops_per_second(rows, model, each) for each in {dtype, torch.float32}) for rows in ROWS]
    return Limits(READ_BYTES / _best_seconds(memory.sum), rates[0], rates[1])


def _flops_per_second(rows: int, model: ModelConfig, dtype: torch.dtype) -> float:
    weight = torch.randn(2 * model.intermediate, model.hidden).to(dtype)
    product = partial(functional.linear, torch.randn(rows, model.hidden).to(dtype), weight)
    return 2 * rows * weight.numel() / _best_seconds(product)


def floor_seconds(run: Run, workload: Workload, model: ModelConfig, limits: Limits, itemsize: int) -> float:
    """The least time of ``run``: products at the machine's rate, weights and KV read once a step.

    Counts the prompt's products as if nothing were dropped, so that what compression saves shows as
    speed beyond the floor.
    """
    per_layer = model.hidden * model.head_size * (2 * model.heads + 2 * model.kv_heads)
    weights = model.layers * (per_layer + 3 * model.hidden * model.intermediate)
    head = model.vocabulary * model.hidden
    prompt = workload.requests * workload.prompt
    attention = 2 * model.layers * model.heads * model.head_size * prompt * workload.prompt
    prefill = (2 * weights * prompt + attention) / limits.many_rows_flops_per_second
    tokens = workload.requests * (workload.output - 1)
    steps = max(1, run.turns["decode"])
    read = (weights + head) * itemsize * steps + run.kv_bytes_mean * steps
    compute = 2 * (weights + head) * tokens / limits.few_rows_flops_per_second
    return prefill + max(read / limits.read_bytes_per_second, compute)


def _best_seconds(work: Callable[[], object]) -> float:
    """The least time of ten."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
