"""How fast KV goes to the host and comes back: spilled, suspended, resumed and recalled."""

import time
from typing import Any

import numpy as np
import torch

from bench.gpu.context import Context
from pyramidserve.types import Compression
from workers.budget.footprint import ShardLayout
from workers.device import synchronize
from workers.execute.generation import cache_needs
from workers.kv.cache import ShardCache
from workers.kv.host import HostStore
from workers.kv.link import link_for
from workers.kv.page_table import PageTables
from workers.kv.pool import KVPool
from workers.kv.rows import row_format
from workers.model.shapes import SHAPES
from workers.policies.registry import plan

EVICT = Compression("pyramid", "evict", kv_keep=0.454)
TOKENS, POOL_BYTES, HOST_BYTES, REPETITIONS = 2048, 5 << 30, 5 << 30, 3


def moves(context: Context, results: dict[str, Any]) -> None:
    """GB/s of a prompt's KV at the shape of Llama 2 13B, and whether what comes back is what went."""
    model = SHAPES["toy" if context.tiny else "llama-2-13b"]
    tokens, sizes = (256, 32 << 20) if context.tiny else (TOKENS, POOL_BYTES)
    dtype = torch.float32 if context.tiny else torch.bfloat16
    size = row_format(dtype).page_bytes(model.kv_heads, model.head_size)
    pool = KVPool(sizes // size, model.kv_heads, model.head_size, dtype, context.device)
    link, layers = link_for(context.device), model.layers
    host = HostStore(
        sizes if context.tiny else HOST_BYTES, link, 16, layers + 1, 2 * model.context, like=pool.rows
    )
    tables = PageTables(pool.allocator, 4, layers, model.context)
    layout = ShardLayout(0, layers, size, model.kv_heads)
    cache = ShardCache(pool, tables, host, layout)
    keep_plan = plan(EVICT, tokens, layers)
    draw = torch.Generator(context.device).manual_seed(1)
    kv = torch.randn(tokens, 2, model.kv_heads, model.head_size, generator=draw, device=context.device)
    kv, positions = kv.to(dtype), np.arange(tokens, dtype=np.int32)
    # The oldest that may go and the newest stay: what is evicted lies in two places.
    keeps = [
        np.concatenate([np.arange(count // 2), np.arange(tokens - count + count // 2, tokens)])
        for count in keep_plan.kept
    ]
    row = kv[0].nbytes
    spilled, held = sum(tokens - len(keep) for keep in keeps) * row, sum(map(len, keeps)) * row
    rates: dict[str, list[float]] = {"spill": [], "suspend": [], "resume": [], "recall": []}
    right = True

    def timed(what: str, size: int, began: float) -> None:
        synchronize(context.device)
        rates[what].append(size / (time.perf_counter() - began) / 1e9)

    for number in range(REPETITIONS):
        cache.open(number, cache_needs(keep_plan, layout))
        synchronize(context.device)
        began = time.perf_counter()
        for layer in range(layers):
            cache.store_prompt(number, layer, positions, kv, keeps[layer][None])
        timed("spill", spilled, began)
        began = time.perf_counter()
        cache.suspend(number)
        timed("suspend", held, began)
        began = time.perf_counter()
        cache.resume(number)
        timed("resume", held, began)
        began = time.perf_counter()
        for layer in range(layers):
            cache.gather(number, layer, recall=True)
        timed("recall", spilled, began)
        for layer in range(layers if not number else 0):
            gathered = cache.gather(number, layer, recall=True)
            right &= torch.equal(gathered.kv, kv) and bool((gathered.positions == positions).all())
        cache.check_integrity()
        cache.release(number)
    results |= {f"{what}_gb_s": [round(each, 2) for each in found] for what, found in rates.items()}
    results["spilled_gb"], results["held_gb"] = round(spilled / 1e9, 3), round(held / 1e9, 3)
    results["ok"] = right
