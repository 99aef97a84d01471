"""What a prompt's policy looks at in one layer, gathered while the rows attend."""

import torch

from workers.backends.attention import row_weights
from workers.backends.interface import Attention
from workers.budget.observation import Heads, Observation, QueryMoments, RowAttention
from workers.kv.entry import Positions
from workers.model.rope import Rotation
from workers.policies.observed import Moments, over_heads


class LayerObserver:
    """Gathers an observation of one sequence, whose rows come in order, in blocks.

    Attributes:
        rows: newest rows that score.
    """

    def __init__(
        self, observes: Observation | None, heads: Heads, rows: int, past: int, unscored: int
    ) -> None:
        """
        Args:
            observes: None: nothing.
            rows: of the sequence, behind ``past`` tokens.
            unscored: newest tokens whose attention is not wanted.
        """
        self._observes, self._heads = observes, heads
        self._all, self._past = rows, past
        self._context = past + rows - unscored
        self.rows = 0
        if isinstance(observes, RowAttention):
            self.rows = rows if observes.rows is None else min(observes.rows, rows)
        self._attention: torch.Tensor | None = None
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def attend(
        self,
        attention: Attention,
        start: int,
        query: torch.Tensor,
        kv: torch.Tensor,
        unseen: int,
        starts: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output of rows from ``start`` on; see ``Attention.prefill_attention``.

        Args:
            kv: of all tokens up to the rows' own but for the first ``unseen``.
        """
        newest = max(0, min(len(query), start + len(query) - (self._all - self.rows)))
        context = max(0, min(self._context - unseen, len(kv))) if newest else 0
        weights = query.new_zeros(0, dtype=torch.float32)
        over_rows = self._observes.over_rows if isinstance(self._observes, RowAttention) else None
        if newest and isinstance(self._observes, RowAttention) and over_rows != "low":
            begin = start + len(query) - newest - (self._all - self.rows)
            weights = row_weights(self._observes, self.rows, query.device)[begin : begin + newest]
        out, scores = attention.prefill_attention(query, kv, weights, context, starts, over_rows == "max")
        if newest and over_rows == "low":
            own = slice(len(query) - newest, len(query))
            each = self._heads != "mean"
            scores = attention.low_counts(
                query[own], kv, context, None if starts is None else starts[own], each
            )
        if newest:
            if self._attention is None:
                self._attention = scores.new_zeros(len(scores), self._past + self._all)
            seen = self._attention[:, unseen : unseen + context]
            if over_rows == "max":
                torch.maximum(seen, scores, out=seen)
            else:
                seen += scores
        return out

    def take_queries(self, positions: Positions, query: torch.Tensor, rotation: Rotation | None) -> None:
        """Takes in the queries [rows, heads, head size] of the next rows, turned by ``rotation``."""
        if not isinstance(self._observes, QueryMoments):
            return
        counts = int((positions >= self._observes.first).sum())
        own = query[len(query) - counts :].float()
        if rotation is not None:
            cos, sin = (part[len(query) - counts :, None] for part in rotation)
            first, second = own.chunk(2, dim=-1)
            own = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
            # Cosines and sines may be scaled.
            own /= (cos.square() + sin.square()).repeat(1, 1, 2)
        own = own.double()
        self._count += counts
        self._sum = self._sum.to(own.device) + own.sum(dim=0)
        self._squares = self._squares.to(own.device) + torch.einsum("rhi,rhj->hij", own, own)

    @property
    def attention(self) -> torch.Tensor | None:
        """Fp32 [sets, tokens], where a set is a KV head unless the mean of all is wanted; None: none."""
        if self._attention is None or self._heads != "mean":
            return self._attention
        return over_heads(self._attention, "mean")

    @property
    def queries(self) -> Moments | None:
        """Moments of the queries of rows that counted; None where they are not wanted, or none did."""
        if not self._count:
            return None
        mean = self._sum / self._count
        covariance = self._squares / self._count - mean[:, :, None] * mean[:, None, :]
        return Moments(mean.float(), covariance.float())
