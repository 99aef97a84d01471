"""The same load by transformers with its dynamic cache: what a user has without this engine."""

import random
import time
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from bench.gpu.context import Context, free
from bench.gpu.load import GIGABYTE, Load, decoded, random_ids, whole
from workers.device import device_memory
from workers.model.config import ModelConfig

# What transformers calls its cache, before and since 5.24.
CACHE = ({"cache", "past_key_values"} & signature(LlamaForCausalLM.forward).parameters.keys()).pop()
# Of a batch that was too large, what is tried next.
FEWER = 0.85


def transformers_at_most(
    context: Context, twin: Any, model: ModelConfig, load: Load, room: int, most: int
) -> dict[str, Any]:
    """One run at the largest batch it takes: ``most``, or what a cache of ``room`` bytes holds, or less."""
    dtype = next(twin.parameters()).dtype
    per_token = model.layers * 2 * model.kv_heads * model.head_size * dtype.itemsize
    per_sequence = (load.prompt + load.output) * per_token
    batch, tried = max(1, min(most, room // per_sequence)), []
    while True:
        context.check_time()
        try:
            ends = [_end(context, twin, model, load, batch, prompt, per_token) for prompt, _ in load.ends]
        except torch.OutOfMemoryError:
            tried.append(batch)
            batch = int(batch * FEWER)
            free(context.device)
            if not batch:
                raise
        else:
            return {
                "batch": batch,
                **whole(load, batch, ends),
                "device_gb": round(device_memory(context.device).peak / GIGABYTE, 2),
                "out_of_memory_at": tried,
                "ends": ends,
            }


def _end(
    context: Context, twin: Any, model: ModelConfig, load: Load, batch: int, prompt: int, per_token: int
) -> dict[str, Any]:
    draw = random.Random(prompt)
    prompts = [random_ids(draw, prompt, model) for _ in range(batch)]
    began = time.perf_counter()
    ids, cache, steps = torch.tensor(prompts, device=context.device), {CACHE: DynamicCache()}, []
    with torch.inference_mode():
        for number in range(load.steps + 1):
            logits = twin(ids, **cache, use_cache=True, logits_to_keep=1).logits
            ids = logits.argmax(dim=-1)
            ids.tolist()  # as a server does, to stop what has ended
            now = time.perf_counter()
            if number:
                steps.append(now - began)
            else:
                first_tokens = now - began
            began = now
    held = batch * (prompt + load.steps) * per_token
    return decoded(context, model, batch, prompt, first_tokens, steps, held)
