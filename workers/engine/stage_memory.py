"""Builds the memory of a shard: its pool of pages, and its part of the host's memory."""

import torch

from pyramidserve.errors import ConfigurationError
from workers.budget.footprint import ShardLayout
from workers.budget.pages import PAGE_TOKENS
from workers.device import free_bytes
from workers.engine.settings import EngineSettings
from workers.kv.cache import ShardCache
from workers.kv.host import HostStore
from workers.kv.link import HostLink
from workers.kv.near_sinks import Turn
from workers.kv.page_table import PageTables
from workers.kv.pool import KVPool
from workers.kv.rows import row_format, row_shape
from workers.model.config import ModelConfig


def shard_layout(
    model: ModelConfig, first: int, end: int, dtype: torch.dtype, host_dtype: torch.dtype
) -> ShardLayout:
    """The layers ``first`` to ``end`` in pages of rows of ``dtype``, on the host of ``host_dtype``."""
    form = row_format(dtype)
    size = form.page_bytes(model.kv_heads, model.head_size)
    return ShardLayout(first, end, size, model.kv_heads, form.name, row_format(host_dtype).name)


def check_room(settings: EngineSettings, layout: ShardLayout, device: torch.device, workspace: int) -> None:
    """Raises ConfigurationError where ``kv_bytes`` is too little for the layers, or memory too little.

    ``workspace``: bytes that steps need beside it, once the weights are there.
    """
    layers, kv_bytes, free = layout.end - layout.first, settings.kv_bytes, free_bytes(device)
    if kv_bytes < layout.page_bytes * layers:
        raise ConfigurationError(
            f"kv_bytes is {kv_bytes}, less than a page of {layout.page_bytes} bytes for each of "
            f"{layers} layers; give at least {layout.page_bytes * layers}"
        )
    if kv_bytes + workspace > free:
        raise ConfigurationError(
            f"kv_bytes is {kv_bytes}, but beside the weights {device} has {free} bytes free, of "
            f"which steps need {workspace}; give at most {max(0, free - workspace)}, or spread the "
            "model over more shards"
        )
    own = device.type != "cpu"
    rest = free_bytes(torch.device("cpu")) if own else free - kv_bytes - workspace
    if settings.host_bytes > rest:
        raise ConfigurationError(
            f"host_bytes is {settings.host_bytes}, but the host has {rest} bytes free"
            f"{'' if own else ' beside weights, kv_bytes and what steps need'}; give at most {rest}"
        )


def build_cache(
    settings: EngineSettings,
    model: ModelConfig,
    layout: ShardLayout,
    dtype: torch.dtype,
    host_dtype: torch.dtype,
    device: torch.device,
    link: HostLink,
    turn: Turn,
) -> ShardCache:
    """An empty cache of what ``settings`` give it. Raises ConfigurationError where it cannot be pinned."""
    pages, layers = settings.kv_bytes // layout.page_bytes, layout.end - layout.first
    pool = KVPool(pages, model.kv_heads, model.head_size, dtype, device)
    sizes = (settings.max_sequences + settings.max_sessions, layers, model.context)
    # For what each sequence has spilled, what of it was dropped, and for each to be suspended, with index
    # and newest tokens; hidden states wait behind the last layer too, and may take more room than KV.
    plain = host_dtype if host_dtype.is_floating_point else torch.float32
    hidden_bytes = model.hidden * plain.itemsize
    most = max(2, -(-hidden_bytes * PAGE_TOKENS // layout.host_page_bytes)) * model.context
    host_sizes = (3 * sizes[0], layers + 1, most + layout.kv_format.recent_pages * PAGE_TOKENS)
    host_row = row_shape(model.kv_heads, model.head_size, host_dtype)
    like = torch.empty((0, *host_row), dtype=host_dtype, device=device)
    host = HostStore(settings.host_bytes, link, *host_sizes, like=like)
    windows = model.windows[layout.first : layout.end]
    return ShardCache(pool, PageTables(pool.allocator, *sizes), host, layout, windows, turn)
