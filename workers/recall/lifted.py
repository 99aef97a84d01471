"""Rows of earlier turns that ``prune`` had dropped, on their way through deeper layers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from workers.device import to_device
from workers.kv.entry import GatheredLayer, Positions


@dataclass(frozen=True)
class LiftedRows:
    """Rows in order of positions.

    Attributes:
        positions: int32 [rows], ascending.
        hidden: [rows, hidden].
    """

    positions: Positions
    hidden: torch.Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, rows: int) -> "LiftedRows":
        """The first of them."""
        return LiftedRows(self.positions[:rows], self.hidden[:rows])

    def joined(self, positions: Positions, hidden: torch.Tensor) -> "LiftedRows":
        """With more rows, in order of positions."""
        positions = np.concatenate([self.positions, positions])
        order = positions.argsort()
        hidden = torch.cat([self.hidden, hidden.to(self.hidden)])[to_device(order, hidden.device)]
        return LiftedRows(positions[order], hidden)


def attend(query: torch.Tensor, positions: Positions, past: GatheredLayer, window: int) -> torch.Tensor:
    """Attention of rows at ``positions``, ascending, to all of ``past`` that is not behind them.

    Args:
        query: [rows, heads, head size].
        window: the newest positions that are attended to, a row's own among them; 0: all.

    Returns:
        [rows, heads * head size].
    """
    reach = int(np.searchsorted(past.positions[0], positions[-1], side="right"))
    seen = past.positions[:, :reach] <= positions[:, None]
    if window:
        seen &= past.positions[:, :reach] > positions[:, None] - window
    visible = to_device(seen, query.device)
    key, value = past.kv[:reach].to(query.dtype).unbind(1)
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=visible,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)
