"""The kernels in plain torch: the reference of all others, and what runs where there are none."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from workers.backends.attention import low_counts, prefill_attention, window_scores
from workers.backends.interface import Attended, FusedDecode
from workers.backends.stopwatch import Stopwatch
from workers.backends.tuning import ReferenceTuning
from workers.kv.pool import PagedBatch
from workers.kv.rows import row_format
from workers.kv.spilled_keys import index_scales, unpack
from workers.model.config import ModelConfig
from workers.model.operations import HeadNorms, LayerWeights
from workers.model.rope import Rotation

CPU = torch.device("cpu")


class ReferenceBackend:
    """See ``Backend``. On any device, in any type."""

    name = "reference"

    def __init__(
        self,
        dtype: torch.dtype,
        tuning: ReferenceTuning = ReferenceTuning(),
        device: torch.device = CPU,
    ) -> None:
        """``dtype`` is of weights, KV and activations, which are on ``device``."""
        self.activations, self._tuning, self._on_card = dtype, tuning, device.type != "cpu"
        self._gather_bytes = tuning.card_gather_bytes if self._on_card else tuning.gather_bytes
        self.stopwatch = Stopwatch()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with self.stopwatch.on("gemm"):
            return functional.linear(x, weight, bias)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with self.stopwatch.on("gemm"):
            if x.dtype == torch.float32:
                return functional.linear(x, weight)
            if x.device.type != "cpu":
                return torch.mm(x, weight.T, out_dtype=torch.float32)
            # A processor's product has the type of its factors: they are widened, some columns at a time.
            logits, wide = x.new_empty(len(x), len(weight), dtype=torch.float32), x.float()
            for start in range(0, len(weight), self._tuning.widened_columns):
                columns = slice(start, start + self._tuning.widened_columns)
                torch.mm(wide, weight[columns].float().T, out=logits[:, columns])
            return logits

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        with self.stopwatch.on("elementwise"):
            return functional.rms_norm(x, weight.shape, weight, epsilon)

    def silu_product(self, gate_up: torch.Tensor) -> torch.Tensor:
        with self.stopwatch.on("elementwise"):
            gate, up = gate_up.chunk(2, dim=-1)
            return functional.silu(gate, inplace=True) * up

    def rotate(
        self,
        projected: torch.Tensor,
        rotation: Rotation | None,
        heads: int,
        kv_heads: int,
        norms: HeadNorms | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self.stopwatch.on("elementwise"):
            rows, _, head_size = projected.shape
            rotated, value = torch.split(projected, [heads + kv_heads, kv_heads], dim=1)
            if norms is not None:
                query, key = torch.split(rotated, [heads, kv_heads], dim=1)
                query = functional.rms_norm(query, norms.query.shape, norms.query, norms.epsilon)
                key = functional.rms_norm(key, norms.key.shape, norms.key, norms.epsilon)
                rotated = torch.cat((query, key), dim=1)
            if rotation is not None:
                cos, sin = (part.to(projected.dtype)[:, None] for part in rotation)
                first, second = rotated.chunk(2, dim=-1)
                rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            query, key = torch.split(rotated, [heads, kv_heads], dim=1)
            kv = torch.cat((key, value), dim=1)
            return query.contiguous(), kv.view(rows, 2, kv_heads, head_size)

    def prefill_attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        weights: torch.Tensor,
        context: int,
        starts: torch.Tensor | None = None,
        greatest: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self.stopwatch.on("attention"):
            kv = kv.to(query.dtype)
            attended = prefill_attention(query, kv[:, 0], kv[:, 1], starts)
            newest = slice(len(query) - len(weights), len(query))
            scoring = None if starts is None else starts[newest]
            scored = (query[newest], kv[:, 0], weights, context, self._tuning.score_rows, scoring, greatest)
            return attended, window_scores(*scored)

    def low_counts(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        context: int,
        starts: torch.Tensor | None,
        each: bool,
    ) -> torch.Tensor:
        with self.stopwatch.on("attention"):
            key = kv[:, 0].to(query.dtype)
            return low_counts(query, key, context, self._tuning.score_rows, starts, each)

    def decode_attention(self, query: torch.Tensor, batch: PagedBatch, tail: int) -> Attended:
        lengths = batch.lengths.tolist()
        spilled = batch.spilled.lengths.tolist() if batch.spilled else [0] * len(lengths)
        out = query.new_empty(len(query), query[0].numel())
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        shares = query.new_empty(len(query), batch.rows.shape[2], tail, dtype=torch.float32)
        row_bytes = 2 * batch.rows.shape[2] * query.shape[2] * query.dtype.itemsize
        start = 0
        while start < len(query):
            end, longest, most = start + 1, lengths[start], spilled[start]
            while end < len(query):
                longer, more = max(longest, lengths[end]), max(most, spilled[end])
                if (end + 1 - start) * (longer + more) * row_bytes > self._gather_bytes:
                    break
                end, longest, most = end + 1, longer, more
            with self.stopwatch.on("attention"):
                kv, there = batch.gather_all(start, end, longest, most, query.dtype)
                out[start:end], lse[start:end], probabilities = _attend_gathered(
                    query[start:end], kv, there
                )
                if tail:
                    shares[start:end] = _newest(probabilities, batch.lengths[start:end], tail)
            start = end
        return Attended(out, lse, shares)

    def indexed_shares(self, query: torch.Tensor, index: PagedBatch, counts: torch.Tensor) -> torch.Tensor:
        most, form = int(counts.max()), row_format(index.rows.dtype)
        scaling = form.index_scale_rows
        rows = index.gather(0, len(query), scaling + -(-most // form.keys_per_row))
        kv_heads, head_size = rows.shape[-2], query.shape[-1]
        with self.stopwatch.on("attention"):
            codes = unpack(rows[:, scaling:])[:, :most].float().view(len(rows), most, kv_heads, head_size)
            grouped = query.float().view(len(query), kv_heads, -1, head_size) * head_size**-0.5
            # What the least key adds is the same for all tokens of a head.
            steps = index_scales(rows[:, :scaling])[1].view(len(rows), kv_heads, 1, head_size)
            logits = torch.einsum("sngd,stnd->sngt", grouped * steps, codes)
            beyond = torch.arange(most, device=query.device) >= counts[:, None]
            logits.masked_fill_(beyond[:, None, None], float("-inf"))
            return logits.softmax(dim=-1).sum(dim=(1, 2)).masked_fill_(beyond, -1)

    def fuse(
        self, layers: Sequence[LayerWeights], model: ModelConfig, stored: torch.dtype
    ) -> FusedDecode | None:
        return None

    def linear_scratch_bytes(self, rows: int, columns: int, size: int) -> int:
        return 0

    def logits_scratch_bytes(self, rows: int, columns: int, size: int) -> int:
        widens = self.activations != torch.float32
        return (rows + min(columns, self._tuning.widened_columns)) * size * 4 if widens else 0

    def prefill_scratch_bytes(self, model: ModelConfig, rows: int, tokens: int, window: int) -> int:
        # Logits, in their own type and in fp32, and what they become.
        sizes = {self.activations.itemsize, 4}
        scored = min(self._tuning.score_rows, rows, window) * tokens * model.heads * (sum(sizes) + 4)
        if not self._on_card:
            return scored
        # Keys and values of all heads, and the mask with what the product adds for it.
        each = self.activations.itemsize
        return max(scored, 2 * tokens * model.heads * model.head_size * each + rows * tokens * (1 + each))

    def decode_scratch_bytes(self, model: ModelConfig, sequences: int, stored: torch.dtype) -> int:
        # What is gathered, and either its keys or its values once more in the order of the product.
        longest = model.context * 2 * model.kv_heads * model.head_size * self.activations.itemsize
        gathered = max(self._gather_bytes, longest)
        if stored.is_floating_point:
            return gathered * 3 // 2
        # Codes on their way to numbers, which are fp32 before they are of the type of activations.
        return gathered + gathered // self.activations.itemsize * (1 + 2 * 4)


def _attend_gathered(
    query: torch.Tensor, kv: torch.Tensor, there: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over gathered caches [sequences, most, 2, KV heads, head size].

    ``there``: which tokens there are, bool [sequences, most]. Returns output, ``lse`` and probabilities,
    [sequences, KV heads, queries of each, most].
    """
    key, value = kv.unbind(2)
    grouped = query.view(len(query), key.shape[2], -1, query.shape[-1])
    logits = torch.matmul(grouped, key.permute(0, 2, 3, 1)).float() * query.shape[-1] ** -0.5
    logits.masked_fill_(~there[:, None, None], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    attended = torch.matmul(probabilities.to(value.dtype), value.transpose(1, 2))
    return attended.flatten(1), logits.logsumexp(dim=-1).flatten(1), probabilities


def _newest(probabilities: torch.Tensor, lengths: torch.Tensor, tail: int) -> torch.Tensor:
    """Those of the newest ``tail`` of the first ``lengths`` tokens, as ``Attended.shares``."""
    # Zeros before the first token, where the tail is longer.
    shares = functional.pad(probabilities.mean(dim=2), (tail, 0))
    columns = torch.arange(tail, device=lengths.device) + lengths[:, None]
    return shares.gather(2, columns[:, None].expand(-1, shares.shape[1], -1))
