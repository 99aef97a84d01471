"""Which tokens stay: the counts come from the plan, the choice from attention."""

import torch


def keep_of_prompt(
    scores: torch.Tensor | None, tokens: int, kept: int, recent: int, sinks: int, device: torch.device
) -> torch.Tensor:
    """Chooses what a layer keeps of ``tokens`` prompt tokens, on ``device``, where ``scores`` are.

    Args:
        scores: fp32 [tokens - recent]; None where sinks and recent tokens are all that is kept.
        kept: tokens to keep, >= ``recent``; with scores, >= ``recent`` + ``sinks``.
        recent: newest tokens, always kept.
        sinks: oldest tokens, always kept.

    Returns:
        Their indices in order, int64 [kept].
    """
    context, budget = tokens - recent, kept - recent
    if scores is None:
        chosen = torch.arange(budget, device=device)
    else:
        scores[:sinks] = float("inf")
        chosen = torch.topk(scores, budget).indices.sort().values
    return torch.cat((chosen, torch.arange(context, tokens, device=device)))


def best_of_chunk(scores: torch.Tensor, keeps: torch.Tensor) -> torch.Tensor:
    """Chooses what each layer keeps of a chunk of generated tokens; of equals, the older.

    Args:
        scores: fp32 [layers, chunk].
        keeps: how many each layer keeps, int64 [layers].

    Returns:
        Which stay, bool [layers, chunk].
    """
    order = scores.sort(descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) < keeps[:, None]


def complement(chosen: torch.Tensor, tokens: int) -> torch.Tensor:
    """The indices below ``tokens`` that are not in ``chosen``, in order, int64."""
    left = torch.ones(tokens, dtype=torch.bool, device=chosen.device)
    left[chosen] = False
    return left.nonzero().flatten()
