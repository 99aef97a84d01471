"""What travels through a pipeline: the header of a step, before its tensor."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from pyramidserve.types import Compression, Constraint, Sampling, TokenLogprob
from workers.budget.released import ReleasedSequence
from workers.budget.span import Span

# Rows of a verification, and of a decode step that feeds known outputs, at most.
VERIFIED_ROWS = 64
NO_POSITIONS: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)

# Drawn in place of an id where logits are not finite.
NO_TOKEN = -1
# Why a sequence broke from which such was drawn.
NOT_FINITE = "not finite"


class StepKind(Enum):
    """What a step does with its sequences."""

    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"
    SUSPEND = "suspend"
    RESUME = "resume"
    PARK = "park"
    RELEASE = "release"


@dataclass(frozen=True)
class SequenceSpec:
    """What every shard must know of a sequence. ``sampling.seed`` is set.

    Attributes:
        continues: a parked sequence, of whose tokens the first ``reused`` are the prompt's; 0: none.
        recall: what that has on the host comes back.
        trace: the prefill reports the positions that each layer keeps and the first token's logits.
        prompt_ids, output_ids: where drawing looks at them, the prompt, and what is known of the output.
        banned: ids that are not drawn before there are ``min_tokens`` outputs.
        instructions: of the prompt, where a floor keeps some of them.
    """

    sequence: int
    prompt_tokens: int
    compression: Compression
    sampling: Sampling
    continues: int = 0
    reused: int = 0
    recall: bool = False
    trace: bool = False
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    min_tokens: int = 0
    constraint: Constraint | None = None
    instructions: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ShardMemory:
    """A shard's memory behind a step; ``device_bytes`` as torch's allocator has them, 0 on a CPU."""

    pages_in_use: int
    host_bytes: int
    resident_bytes: int
    device_bytes: int = 0
    device_peak_bytes: int = 0


@dataclass(frozen=True)
class PrefillTrace:
    """What a traced prefill kept on one shard: per layer, input positions in order, int32 [sets, kept]."""

    sequence: int
    positions: tuple[npt.NDArray[np.int32], ...]


@dataclass(frozen=True)
class TopLogits:
    """The first token's most likely ids and their logits, best first."""

    sequence: int
    ids: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """One micro-batch on its way through the shards, or sequences to be moved, parked or released.

    A decode adds one token to each sequence, which may be a draft, or several whose outputs are known; a
    verification adds several at once, in place of all drafts, attending to what is on the host too.

    Attributes:
        number: counts the steps of a pipeline.
        sequences: in order of rows.
        rows: rows of each sequence, as they are now; ``prune`` makes them fewer from shard to shard.
        positions: input position of every row, int32.
        draws: tokens that are drawn of each sequence, behind its last rows: one, or in a verification, and
            where log-probabilities are told, one of each row.
        output_indices: output index of each token that is drawn.
        forced: for each of them, the token to take instead of drawing one; -1 draws.
        generated: how many generated tokens of each sequence are verified.
        lengths: of each sequence, the most tokens that its KV may have; see ``Rope``.
        new: sequences that begin, in a prefill; in order of ``sequences``.
        slice_steps: how long a prefill may hold up decode steps, in such steps.
        memory, released, traces: what the shards so far report.
        top_logits: what the last shard reports of traced sequences.
        failed: sequences whose policy has failed on a shard, and what it did.
        logprobs: of each token that is drawn, where it is told; none: of no token.
    """

    number: int
    kind: StepKind
    sequences: tuple[int, ...]
    rows: tuple[int, ...] = ()
    positions: npt.NDArray[np.int32] = field(default_factory=lambda: NO_POSITIONS)
    draws: tuple[int, ...] = ()
    output_indices: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    new: tuple[SequenceSpec, ...] = ()
    slice_steps: float = 0.0
    memory: tuple[ShardMemory, ...] = ()
    released: tuple[tuple[ReleasedSequence, ...], ...] = ()
    traces: tuple[PrefillTrace, ...] = ()
    top_logits: tuple[TopLogits, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    logprobs: tuple[TokenLogprob | None, ...] = ()

    @property
    def rows_and_lengths(self) -> list[tuple[int, int]]:
        """Of each sequence, its rows and ``lengths``."""
        return list(zip(self.rows, self.lengths, strict=True))

    @property
    def drawing(self) -> tuple[int, ...]:
        """The sequence of every token that is drawn."""
        pairs = zip(self.sequences, self.draws, strict=True)
        return tuple(key for key, count in pairs for _ in range(count))

    @property
    def fed(self) -> tuple[int, ...]:
        """The sequence of every row."""
        return tuple(key for key, rows in zip(self.sequences, self.rows, strict=True) for _ in range(rows))
