"""How many tokens a second a model of a certain shape comes to, in bfloat16, and what memory that takes.

Not all of an output is generated, but some of it where it begins and some where it ends.
"""

import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.gpu.context import Context, Section, free
from bench.gpu.load import GIGABYTE, Load, clear, decoded, submit_batch, until_all_decode, whole
from bench.gpu.transformers_batch import transformers_at_most
from bench.gpu.twin import transformers_twin
from pyramidserve.types import Compression
from workers.backends.reference import ReferenceBackend
from workers.bench.measure import TurnLog
from workers.budget.footprint import peak_pages
from workers.device import allocator_retries, device_memory, free_bytes
from workers.engine.engine import Engine, EngineConfig
from workers.engine.pipeline import connect_local
from workers.execute.tuning import ExecuteTuning
from workers.execute.workspace import step_workspace_bytes
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import ModelConfig
from workers.model.shapes import SHAPES
from workers.model.work import weights_read
from workers.policies.registry import plan
from workers.schedule.step import StepKind

POLICIES = {"full": Compression(), "prune": Compression("pyramid", "prune", kv_keep=0.454)}
TRANSFORMERS = "transformers"
MAX_PREFILL_TOKENS, MAX_SEQUENCES = 8192, 640
# What is left to the allocator and the libraries.
RESERVE, TINY_POOL, HOST_BYTES = 5 << 29, 16 << 20, 2 << 30
# Of the memory that is free, what transformers' cache may come to; it copies a layer of it at every step.
SHARE_FOR_CACHE = 0.85

TINY = (Load(256, 16, 4, steps=4, repetitions=1), Load(384, 16, 2, steps=4, repetitions=1))
CHAT, LONG = Load(512, 256, 32, steps=16), Load(4096, 128, 8, steps=16, repetitions=1)


def throughput(shape: str, *loads: Load) -> Section:
    """The section that measures ``full``, ``prune`` and transformers on a shape; on the toy if tiny."""
    return partial(_throughput, shape, loads)


def _throughput(shape: str, loads: tuple[Load, ...], context: Context, results: dict[str, Any]) -> None:
    shape, loads = ("toy", TINY[: len(loads)]) if context.tiny else (shape, loads)
    log, model_name = TurnLog(), f"random:{shape}"
    dtype = torch.float32 if context.tiny else torch.bfloat16
    config = EngineConfig(
        model_name,
        dtype=str(dtype).removeprefix("torch."),
        device=str(context.device),
        backend="reference" if context.tiny else "auto",
        kv_bytes=TINY_POOL if context.tiny else _room(SHAPES[shape], dtype, context.device),
        host_bytes=TINY_POOL if context.tiny else HOST_BYTES,
        max_sequences=64 if context.tiny else MAX_SEQUENCES,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
    )
    engine = Engine(config, partial(connect_local, on_advance=log))
    (stage,) = engine.stages
    results["model"], results["pool_gb"] = model_name, round(config.kv_bytes / GIGABYTE, 2)
    results["workspace_gb"] = round(stage.workspace_bytes() / GIGABYTE, 2)
    weights = sum(parameter.nbytes for parameter in stage.model.parameters())
    results["weights_gb"] = round(weights / GIGABYTE, 2)
    bench = Bench(context, engine, log)
    bench.run(Load(loads[0].prompt, 8, 2, steps=2), 2, "prune")  # kernels are chosen, workspaces grow
    for load in loads:
        found = results[load.name] = {f"batch {load.batch}": {name: [] for name in POLICIES}}
        for _ in range(load.repetitions):
            for name in POLICIES:
                found[f"batch {load.batch}"][name].append(bench.run(load, load.batch, name))
                context.flush()
    exhausted = results[loads[0].name]["memory exhausted"] = {}
    for name in POLICIES:
        exhausted[name] = bench.run(loads[0], bench.most(loads[0], name), name)
        context.flush()
    engine.check_integrity()
    twin = transformers_twin(stage.model, engine.model, resolve_checkpoint(config.checkpoint))
    model = engine.model
    del engine, stage, bench.engine  # the pool goes with them, the weights stay
    free(context.device)
    room = TINY_POOL if context.tiny else int(free_bytes(context.device) * SHARE_FOR_CACHE)
    exhausted[TRANSFORMERS] = transformers_at_most(context, twin, model, loads[0], room, MAX_SEQUENCES)
    results["ratios"] = ratios(results[loads[0].name], f"batch {loads[0].batch}")


def ratios(found: dict[str, Any], batch: str) -> dict[str, float]:
    """``prune`` over ``full`` at equal batch, in speed and in KV, and both where memory is exhausted."""
    speed = {name: median(run["tokens_s"] for run in found[batch][name]) for name in POLICIES}
    held = {name: found[batch][name][0]["kv_gb"] for name in POLICIES}
    most = {name: run["tokens_s"] for name, run in found["memory exhausted"].items()}
    return {
        "equal batch": round(speed["prune"] / speed["full"], 3),
        "kv": round(held["prune"] / held["full"], 3),
        "memory exhausted": round(most["prune"] / most["full"], 3),
        "over transformers": round(most["prune"] / most[TRANSFORMERS], 3),
    }


def _room(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that the KV pool may have."""
    weights = (weights_read(model) + model.vocabulary * model.hidden) * dtype.itemsize
    longest = max(MAX_PREFILL_TOKENS, model.context)
    workspace = step_workspace_bytes(
        *(model, ReferenceBackend(dtype, device=device), longest, MAX_SEQUENCES, dtype.itemsize),
        *(dtype, ExecuteTuning().block_rows),
    )
    return free_bytes(device) - weights - workspace - RESERVE


@dataclass
class Bench:
    """An engine on its own, measured again and again."""

    context: Context
    engine: Engine
    log: TurnLog

    def most(self, load: Load, name: str) -> int:
        """How many of a load's sequences the pool holds to their ends."""
        (stage,) = self.engine.stages
        peak = max(
            peak_pages(plan(POLICIES[name], prompt, self.engine.model.layers), stage.layout, output)
            for prompt, output in load.ends
        )
        sequences = self.engine.loop.scheduler.layout.max_sequences
        return min(sequences, stage.cache.device.pool.allocator.pages // peak)

    def run(self, load: Load, batch: int, name: str) -> dict[str, Any]:
        """One run: at both ends of the output, and what follows for the whole of it."""
        self.context.check_time()
        ends = [self._end(load, batch, POLICIES[name], *end) for end in load.ends]
        return {
            "batch": batch,
            **whole(load, batch, ends),
            "device_gb": round(device_memory(self.context.device).peak / GIGABYTE, 2),
            "memory_given_back": allocator_retries(self.context.device),
            "ends": ends,
        }

    def _end(
        self, load: Load, batch: int, compression: Compression, prompt: int, output: int
    ) -> dict[str, Any]:
        engine = self.engine
        began = time.perf_counter()
        sequences = submit_batch(engine, compression, batch, prompt, output)
        until_all_decode(engine, sequences, self.context.check_time)
        first_tokens = time.perf_counter() - began
        steps: list[float] = []
        decoding = self.log.seconds[StepKind.DECODE]
        while len(steps) < load.steps and not (steps and self.context.left < 0):
            before, began = len(decoding), time.perf_counter()
            engine.step()
            if len(decoding) > before:
                steps.append(time.perf_counter() - began)
        (memory,) = engine.loop.memory
        held = memory.pages_in_use * engine.stages[0].layout.page_bytes
        clear(engine, sequences)
        return decoded(self.context, engine.model, batch, prompt, first_tokens, steps, held)
