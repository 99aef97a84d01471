"""Attention on packed rows, and the scores that compression reads off it. Plain torch."""

import torch
from torch.nn import functional

from workers.kv.pool import PagedBatch

# Rows of the recent window scored at once: bounds the scratch memory to this many rows of probabilities.
SCORE_ROWS = 128
# KV gathered at once in a decode step, unless one sequence alone has more.
GATHER_BYTES = 32 << 20


def prefill_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence with itself.

    Args:
        query: [n, heads, head size].
        key: [n, KV heads, head size], as is ``value``.

    Returns:
        [n, heads * head size].
    """
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)


def window_scores(query: torch.Tensor, key: torch.Tensor, distance_weight: float) -> torch.Tensor:
    """How much the recent window attends to the context (arXiv 2405.12532, section 3.2).

    Args:
        query: the recent window's rows, [R, heads, head size].
        key: all rows, the window's last, [n, KV heads, head size].
        distance_weight: weight of the newest row; the oldest weighs 1, linear between.

    Returns:
        fp32 [n - R]: attention probabilities averaged over heads, weighted and summed over rows.
    """
    window, context = len(query), len(key) - len(query)
    keys = key.permute(1, 2, 0)[:, None]  # [KV heads, 1, head size, n]
    weights = torch.linspace(1, distance_weight, window, device=query.device)
    scores = torch.zeros(context, device=query.device)
    columns = torch.arange(len(key), device=query.device)
    scale = query.shape[-1] ** -0.5
    for start in range(0, window, SCORE_ROWS):
        rows = query[start : start + SCORE_ROWS]
        grouped = rows.view(len(rows), len(keys), -1, rows.shape[-1]).permute(1, 2, 0, 3)
        logits = torch.matmul(grouped, keys).float().mul_(scale)
        last = columns[context + start : context + start + len(rows), None]
        logits.masked_fill_(columns > last, float("-inf"))
        probabilities = logits.softmax(dim=-1)[..., :context].mean(dim=(0, 1))
        scores += weights[start : start + len(rows)] @ probabilities
    return scores


def decode_attention(query: torch.Tensor, batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """One query row a sequence, over that sequence's cache.

    Args:
        query: [sequences, heads, head size].

    Returns:
        The output [sequences, heads * head size], and the attention probabilities averaged over
        heads, fp32 [sequences, longest]; 0 beyond a sequence's length.
    """
    lengths = batch.lengths.tolist()
    attended = query.new_empty(len(query), query[0].numel())
    probabilities = query.new_zeros(len(query), max(lengths), dtype=torch.float32)
    row_bytes = batch.rows[0].nbytes
    start = 0
    while start < len(query):
        end, longest = start + 1, lengths[start]
        while end < len(query):
            longer = max(longest, lengths[end])
            if (end + 1 - start) * longer * row_bytes > GATHER_BYTES:
                break
            end, longest = end + 1, longer
        attended[start:end], probabilities[start:end, :longest] = _attend_gathered(
            query[start:end], batch.gather(start, end, longest), batch.lengths[start:end]
        )
        start = end
    return attended, probabilities


def _attend_gathered(
    query: torch.Tensor, kv: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``decode_attention`` over gathered caches [sequences, longest, 2, KV heads, head size]."""
    key, value = kv.unbind(2)
    grouped = query.view(len(query), key.shape[2], -1, query.shape[-1])
    logits = torch.matmul(grouped, key.permute(0, 2, 3, 1)).float() * query.shape[-1] ** -0.5
    beyond = torch.arange(kv.shape[1], device=kv.device) >= lengths[:, None]
    logits.masked_fill_(beyond[:, None, None], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    attended = torch.matmul(probabilities.to(value.dtype), value.transpose(1, 2))
    return attended.flatten(1), probabilities.mean(dim=(1, 2))
