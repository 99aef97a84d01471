"""What a backend offers: dense operations to the model, attention to steps, scratch sizes to the memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.backends.stopwatch import Stopwatch
from workers.kv.pool import PagedBatch, PagedStep
from workers.model.config import ModelConfig
from workers.model.operations import LayerWeights, Operations
from workers.model.rope import Rotation


@dataclass(frozen=True)
class Attended:
    """What attention of one row a sequence comes to.

    Attributes:
        out: [sequences, heads * head size].
        lse: the logarithm of the sum of the exponentiated logits, fp32 [sequences, heads].
        shares: a by-product, the attention to the newest tokens, averaged over the heads of a KV head, fp32
            [sequences, KV heads, tail], the newest last; 0 where a cache is shorter. With ``lse`` they
            follow from those tokens' keys alone, so that attention which knows of no shares will do.
    """

    out: torch.Tensor
    lse: torch.Tensor
    shares: torch.Tensor


class Attention(Protocol):
    """Attention over what is cached."""

    def prefill_attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        weights: torch.Tensor,
        context: int,
        starts: torch.Tensor | None = None,
        greatest: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of the newest rows of one sequence, and the scores that are read off it.

        Args:
            query: [rows, heads, head size].
            kv: all tokens so far, the rows' own last, [tokens, 2, KV heads, head size].
            weights: fp32, of the newest rows, which score what they see; empty if none do.
            context: oldest tokens that are scored.
            starts: the first token that each row attends to, int32 [rows], ascending; None: of all.
            greatest: as ``window_scores`` takes it.

        Returns:
            The output [rows, heads * head size], and scores as ``window_scores`` has them, fp32
            [KV heads, context].
        """
        ...

    def low_counts(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        context: int,
        starts: torch.Tensor | None,
        each: bool,
    ) -> torch.Tensor:
        """Rows in which a token gets less than an even share; see ``attention.low_counts``.

        Args:
            query: the newest rows, [rows, heads, head size].
            kv, context, starts: as ``prefill_attention`` takes them.
        """
        ...

    def decode_attention(self, query: torch.Tensor, batch: PagedBatch, tail: int) -> Attended:
        """One query row a sequence, over that sequence's cache.

        Args:
            query: [sequences, heads, head size].
            tail: newest tokens whose attention is wanted.
        """
        ...

    def indexed_shares(self, query: torch.Tensor, index: PagedBatch, counts: torch.Tensor) -> torch.Tensor:
        """Attention that tokens would get of whose keys there is an index alone; see ``SpilledKeys``.

        Args:
            query: [sequences, heads, head size].
            index: where its rows lie.
            counts: tokens that are indexed of each sequence, int32 [sequences]; one has some.

        Returns:
            Summed over heads, fp32 [sequences, most tokens]; -1 for those that there are not.
        """
        ...


class Scratch(Protocol):
    """What operations allocate beside their results, at most, in bytes."""

    def linear_scratch_bytes(self, rows: int, columns: int, size: int) -> int:
        """The most that ``linear`` allocates beside its result."""
        ...

    def logits_scratch_bytes(self, rows: int, columns: int, size: int) -> int:
        """The most that ``logits`` allocates beside its result."""
        ...

    def prefill_scratch_bytes(self, model: ModelConfig, rows: int, tokens: int, window: int) -> int:
        """The most that ``prefill_attention`` of ``rows`` rows allocates beside its results."""
        ...

    def decode_scratch_bytes(self, model: ModelConfig, sequences: int, stored: torch.dtype) -> int:
        """The most that ``decode_attention`` over rows of type ``stored`` allocates beside its results."""
        ...


class FusedDecode(Protocol):
    """One new token of each sequence through all layers of a shard."""

    @property
    def max_rows(self) -> int:
        """Sequences at once, at most."""
        ...

    def __call__(
        self, hidden: torch.Tensor, rotation: Rotation, step: PagedStep, tail: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the tokens' keys and values, and attends to them and all before.

        Args:
            hidden: [sequences, hidden].
            tail: newest tokens whose attention is wanted.

        Returns:
            The last layer's output, and the attention to the newest ``tail`` tokens, averaged over the
            heads of a KV head, fp32 [layers, sequences, KV heads, tail], the newest last; 0 where a cache
            is shorter.
        """
        ...


class Backend(Operations, Attention, Scratch, Protocol):
    """All that a shard computes with; ``name`` is one of BACKENDS, ``stopwatch`` says where time goes."""

    name: str
    stopwatch: Stopwatch

    def fuse(
        self, layers: Sequence[LayerWeights], model: ModelConfig, stored: torch.dtype
    ) -> FusedDecode | None:
        """A decode step in one call, over rows of type ``stored``; None where it is not to be had."""
        ...
