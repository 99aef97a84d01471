"""Attention of a prefill, and the scores that compression reads off it. Plain torch."""

import torch
from torch.nn import functional


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention of the newest rows of one sequence.

    Args:
        query: [rows, heads, head size].
        key: all tokens, the rows' own last, [tokens, KV heads, head size], as is ``value``.
        starts: the first token that each row attends to, integers [rows]; None: the first of all.

    Returns:
        [rows, heads * head size].
    """
    rows, tokens = len(query), len(key)
    mask = None
    if rows < tokens or starts is not None:  # torch's own causal mask begins at the first token
        mask = torch.ones(rows, tokens, dtype=torch.bool, device=query.device).tril(tokens - rows)
    if mask is not None and starts is not None:
        mask &= torch.arange(tokens, device=query.device) >= starts[:, None]
    if mask is not None and query.device.type != "cpu":
        # A GPU's kernels take a mask only where all heads have keys of their own; else all logits are held.
        key, value = (
            part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value)
        )
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)


def window_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    context: int,
    at_once: int,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much rows of the recent window attend to the context (arXiv 2405.12532, section 3.2).

    Args:
        query: the rows, [rows, heads, head size].
        key: all tokens up to the rows' own, which are last, [tokens, KV heads, head size].
        weights: of the rows, fp32 [rows].
        context: oldest tokens that are scored.
        at_once: rows whose probabilities are there together.
        starts: as ``prefill_attention`` takes them.

    Returns:
        fp32 [context]: attention probabilities averaged over heads, weighted and summed over rows.
    """
    before = len(key) - len(query)
    keys = key.permute(1, 2, 0)[:, None]  # [KV heads, 1, head size, tokens]
    scores = torch.zeros(context, device=query.device)
    columns = torch.arange(len(key), device=query.device)
    scale = query.shape[-1] ** -0.5
    for start in range(0, len(query), at_once):
        rows = query[start : start + at_once]
        grouped = rows.view(len(rows), len(keys), -1, rows.shape[-1]).permute(1, 2, 0, 3)
        logits = torch.matmul(grouped, keys).float().mul_(scale)
        last = columns[before + start : before + start + len(rows), None]
        logits.masked_fill_(columns > last, float("-inf"))
        if starts is not None:
            logits.masked_fill_(columns < starts[start : start + len(rows), None], float("-inf"))
        probabilities = logits.softmax(dim=-1)[..., :context].mean(dim=(0, 1))
        scores += weights[start : start + len(rows)] @ probabilities
    return scores


def window_weights(window: int, distance_weight: float, device: torch.device) -> torch.Tensor:
    """Weights of the recent window's rows, fp32 [window]: from 1, the oldest, to ``distance_weight``."""
    return torch.linspace(1, distance_weight, window, device=device)
