"""Attention of a prefill, and the scores that compression reads off it. Plain torch."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from workers.budget.observation import RowAttention


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
    greatest: bool = False,
) -> torch.Tensor:
    """How much rows attend to the context (arXiv 2405.12532, section 3.2).

    Args:
        query: the rows, [rows, heads, head size].
        key: all tokens up to the rows' own, which are last, [tokens, KV heads, head size].
        weights: of the rows, fp32 [rows].
        context: oldest tokens that are scored.
        at_once: rows whose probabilities are there together.
        starts: as ``prefill_attention`` takes them.
        greatest: instead of average and sum the greatest, of all rows and heads (arXiv 2510.13334).

    Returns:
        fp32 [KV heads, context]: attention probabilities averaged over the heads of a KV head, weighted and
        summed over rows.
    """
    scores = torch.zeros(key.shape[1], context, device=query.device)
    for rows, probabilities in _by_rows(query, key, at_once, starts, greatest):
        seen, weight = probabilities[..., :context], weights[rows]
        if greatest:
            scores = scores.maximum((seen * weight[:, None]).amax(dim=1))
        else:
            scores += torch.einsum("r,grn->gn", weight, seen)
    return scores


def low_counts(
    query: torch.Tensor,
    key: torch.Tensor,
    context: int,
    at_once: int,
    starts: torch.Tensor | None = None,
    each: bool = True,
) -> torch.Tensor:
    """Rows in which a token gets less than an even share (Scissorhands, arXiv 2305.17118, algorithm 2).

    Args:
        each: for each KV head; else by the mean over all of them.
        query, key, context, at_once, starts: as ``window_scores`` takes them.

    Returns:
        fp32 [KV heads or 1, context]. A row that does not see a token is not counted.
    """
    counts = torch.zeros(key.shape[1] if each else 1, context, device=query.device)
    before = len(key) - len(query)
    columns = torch.arange(context, device=query.device)
    for rows, probabilities in _by_rows(query, key, at_once, starts):
        if not each:
            probabilities = probabilities.mean(dim=0, keepdim=True)
        ends = torch.arange(before + rows.start + 1, before + rows.stop + 1, device=query.device)
        begins = torch.zeros_like(ends) if starts is None else starts[rows].to(ends)
        low = probabilities[..., :context] < (1 / (ends - begins))[:, None]
        counts += (low & (columns < ends[:, None]) & (columns >= begins[:, None])).sum(dim=1)
    return counts


def _by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    at_once: int,
    starts: torch.Tensor | None,
    greatest: bool = False,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Attention probabilities of some rows after others, [KV heads, rows, tokens].

    They are means of the heads of each, or the ``greatest`` of theirs.
    """
    before = len(key) - len(query)
    keys = key.permute(1, 2, 0)[:, None]  # [KV heads, 1, head size, tokens]
    columns = torch.arange(len(key), device=query.device)
    scale = query.shape[-1] ** -0.5
    for start in range(0, len(query), at_once):
        own = slice(start, min(start + at_once, len(query)))
        rows = query[own]
        grouped = rows.view(len(rows), len(keys), -1, rows.shape[-1]).permute(1, 2, 0, 3)
        logits = torch.matmul(grouped, keys).float().mul_(scale)
        last = columns[before + own.start : before + own.stop, None]
        logits.masked_fill_(columns > last, float("-inf"))
        if starts is not None:
            logits.masked_fill_(columns < starts[own, None], float("-inf"))
        over_heads = torch.amax if greatest else torch.mean
        yield own, over_heads(logits.softmax(dim=-1), dim=1)


def row_weights(observes: RowAttention, rows: int, device: torch.device) -> torch.Tensor:
    """What the attention of a prompt's newest ``rows`` rows is multiplied with, fp32 [rows]."""
    weights = torch.linspace(1, observes.newest, rows, device=device)
    if observes.decay < 1:
        weights *= observes.decay ** torch.arange(rows - 1, -1, -1, device=device)
    return weights
