"""What fits into a pipeline, in sequences that a person can imagine. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyramidserve.types import Compression, StageState
from workers.budget.footprint import fitting, stage_layout
from workers.model.config import ModelConfig
from workers.policies.registry import keeps_all, plan, policy_name
from workers.policies.settled import settled

# A long chat; where the context is shorter, a full one.
SEQUENCE_TOKENS = 4096


@dataclass(frozen=True)
class Capacity:
    """How many sequences of ``tokens`` tokens there can be at once.

    Attributes:
        compressed: of those with ``compression``.
        full: of those that keep all KV on the device.
        max_sequences: the most of any kind.
    """

    tokens: int
    compression: Compression
    compressed: int
    full: int
    max_sequences: int

    def __str__(self) -> str:
        """As in: 24 sequences of 4,096 tokens at keep 0.45; 11 with `full`."""
        if keeps_all(self.compression):
            return f"{self._count(self.full)} of {self.tokens:,} tokens with `full`"
        keep, share = self.compression.kv_keep, self.compression.kv_bytes_keep
        how = f"at keep {keep:g}" if keep is not None else f"with `{policy_name(self.compression)}`"
        if share is not None:
            how = f"with `{policy_name(self.compression)}` at {share:g} of the bytes"
        if self.compression.recall != "off":
            how += f" and recall {self.compression.recall}"
        return f"{self._count(self.compressed)} of {self.tokens:,} tokens {how}; {self.full} with `full`"

    def _count(self, sequences: int) -> str:
        bound = " (max_sequences)" if sequences == self.max_sequences else ""
        return f"{sequences} sequence{'s' * (sequences != 1)}{bound}"


def capacity(
    stages: Sequence[StageState], max_sequences: int, model: ModelConfig, compression: Compression
) -> Capacity:
    """What fits into the pools of ``stages``, which have the ``model``."""
    tokens = min(SEQUENCE_TOKENS, model.context)
    compression = settled(compression, model, stages[0].kv_dtype, max(1, tokens - 1))
    shards = tuple(map(stage_layout, stages))
    pages = [each.pages_total for each in stages]
    on_host = [
        each.host_bytes_limit // shard.host_page_bytes for each, shard in zip(stages, shards, strict=True)
    ]

    def count(kind: Compression) -> int:
        keep = plan(kind, tokens - 1, shards[-1].end)  # the last token is output
        return fitting(keep, shards, pages, on_host, max_sequences)

    return Capacity(tokens, compression, count(compression), count(Compression("full")), max_sequences)
