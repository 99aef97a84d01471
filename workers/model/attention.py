"""Attention of a prefill, and the scores that compression reads off it. Plain torch."""

import torch
from torch.nn import functional

# Rows of the recent window scored at once: bounds the scratch memory to this many rows of probabilities.
SCORE_ROWS = 128


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
