"""What the machine could do at best: its memory bandwidth and its matrix products."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from workers.bench.measure import Run
from workers.bench.workload import Workload
from workers.compression.plan import KeepPlan
from workers.model.config import ModelConfig

READ_BYTES = 512 << 20
ROWS = 2048


@dataclass(frozen=True)
class Limits:
    """Bytes read a second, and floating point operations a second in products of many rows."""

    read_bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Floor:
    """The least time, in seconds, of all prefills of a workload, of a decode step, and of the whole."""

    prefill: float
    decode_step: float
    whole: float


def machine_limits(model: ModelConfig, dtype: torch.dtype) -> Limits:
    """Measures them, at the shape of the model's largest product, in ``dtype`` or fp32: the faster."""
    memory = torch.ones(READ_BYTES // 4)
    rates = [_flops_per_second(model, each) for each in {dtype, torch.float32}]
    return Limits(READ_BYTES / _best_seconds(memory.sum), max(rates))


def floor(
    run: Run, workload: Workload, model: ModelConfig, plan: KeepPlan, limits: Limits, itemsize: int
) -> Floor:
    """The least time of ``run``, of whose prompts ``plan`` says what is computed and kept.

    Products and attention at the machine's rate; weights, and the KV that there was, read once a step.
    """
    prefill = workload.requests * prefill_flops(plan, model) / limits.flops_per_second
    per_layer = model.hidden * model.head_size * (2 * model.heads + 2 * model.kv_heads)
    weights = model.layers * (per_layer + 3 * model.hidden * model.intermediate)
    weights += model.vocabulary * model.hidden
    steps = max(1, run.turns["decode"])
    rows = workload.requests * (workload.output - 1) / steps
    read = (weights * itemsize + run.kv_bytes_decoding) / limits.read_bytes_per_second
    step = max(read, 2 * weights * rows / limits.flops_per_second)
    return Floor(prefill, step, prefill + step * steps)


def prefill_flops(plan: KeepPlan, model: ModelConfig) -> int:
    """Floating point operations of one prompt's products and attention, in rows that are computed."""
    heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size
    flops = 0
    for layer in range(model.layers):
        rows = plan.kept[layer] if plan.drops_hidden_states else plan.prompt_tokens
        more = layer + 1 < model.layers
        going_on = (plan.kept[layer + 1] if plan.drops_hidden_states else rows) if more else 1
        flops += 2 * rows * model.hidden * (heads + 2 * kv_heads)
        flops += 2 * rows * rows * heads  # half of all pairs, twice: with keys and with values
        flops += 2 * going_on * model.hidden * (heads + 3 * model.intermediate)
    return flops


def _flops_per_second(model: ModelConfig, dtype: torch.dtype) -> float:
    weight = torch.randn(2 * model.intermediate, model.hidden).to(dtype)
    product = partial(functional.linear, torch.randn(ROWS, model.hidden).to(dtype), weight)
    return 2 * ROWS * weight.numel() / _best_seconds(product)


def _best_seconds(work: Callable[[], object]) -> float:
    """The least time of ten."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
