"""Where a decode step's attention is accumulated, for all tokens of a micro-batch that are scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.plan import GenerationPlan
from workers.device import to_device
from workers.kv.score_pages import Indices

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChunkScores:
    """Scores of complete chunks of generated tokens, of many sequences at once.

    Attributes:
        each: for each KV head; else by the mean over all.
        rows: row of the micro-batch, int64 [n].
        sources: place in a layer's attention [rows, KV heads or 1, tail], int64 [n].
        places: among the pool's floats, int64 [layers, n].
        weights: what the attention is multiplied with, fp32 [n].
    """

    each: bool
    rows: Indices
    sources: torch.Tensor
    places: torch.Tensor
    weights: torch.Tensor

    def paid(self, shares: torch.Tensor) -> torch.Tensor:
        """What is to be added, fp32 [layers, n], of attention [layers, rows, KV heads, tail]."""
        attention = shares if self.each else shares.mean(dim=2)
        return attention.flatten(1)[:, self.sources] * self.weights


@dataclass(frozen=True)
class CacheScores:
    """Scores of all that one sequence has in the cache.

    Attributes:
        each: for each KV head; else by the mean over all.
        row, sequence: of the micro-batch.
        tokens: scores of each layer, the newest last.
        decay: what scores so far are multiplied with.
        even: where rows are counted that pay less, the even share, fp32 [layers, 1, 1]; None elsewhere.
    """

    each: bool
    row: int
    sequence: int
    tokens: int
    decay: float
    even: torch.Tensor | None

    def paid(self, shares: torch.Tensor) -> torch.Tensor:
        """What is to be added, fp32 [layers, sets, tokens], of attention [layers, rows, KV heads, tail]."""
        own = shares[:, self.row, :, shares.shape[3] - self.tokens :]
        own = own if self.each else own.mean(dim=1, keepdim=True)
        return own if self.even is None else (own < self.even).float()


@dataclass(frozen=True)
class ScoreTargets:
    """Where one decode step's attention goes; ``tail``: newest tokens whose attention is wanted."""

    tail: int
    chunks: tuple[ChunkScores, ...]
    caches: tuple[CacheScores, ...]


@dataclass
class ChunkCollector:
    """Collects what rows pay to chunks.

    Of each row its number, how far behind its newest token each scored one is (itself 1), int64 [n],
    weights [n], and places [layers, sets, n].
    """

    rows: list[int] = field(default_factory=list)
    back: list[Indices] = field(default_factory=list)
    weights: list[Floats] = field(default_factory=list)
    places: list[Indices] = field(default_factory=list)

    def scores(self, each: bool, tail: int, device: torch.device) -> ChunkScores:
        """All that was collected."""
        sets = self.places[0].shape[1]
        sources = [
            ((row * sets + np.arange(sets))[:, None] * tail + tail - back).reshape(-1)
            for row, back in zip(self.rows, self.back, strict=True)
        ]
        return ChunkScores(
            each,
            np.repeat(self.rows, [len(own) for own in sources]),
            to_device(np.concatenate(sources), device),
            to_device(np.concatenate([own.reshape(len(own), -1) for own in self.places], axis=1), device),
            to_device(np.concatenate([np.tile(own, sets) for own in self.weights]), device),
        )


def window_weights(generation: GenerationPlan, tokens: int, behind: int) -> Floats:
    """The new token's weight for each of the ``behind`` tokens in complete chunks.

    The newest of the window that is behind a chunk weighs ``newest``, the oldest 1.
    """
    assert generation.accumulates is not None
    age = tokens - 1 - np.arange(generation.chunk, behind + 1, generation.chunk)
    slope = (generation.accumulates.newest - 1) / max(1, generation.window - 1)
    return np.repeat(1 + slope * age, generation.chunk).astype(np.float32)


def looks(generation: GenerationPlan, generated: int) -> bool:
    """Whether the row of the ``generated``-th token counts in the next choice among all tokens."""
    assert generation.accumulates is not None
    rows = generation.accumulates.rows
    left = generation.window + (generation.chunks(generated - 1) + 1) * generation.chunk - generated
    return rows is None or left < rows


def runs(lengths: Sequence[int]) -> list[slice]:
    """Where equal ``lengths`` follow one another."""
    cuts = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    return [slice(first, end) for first, end in pairwise(cuts)]
