"""Attention that generated tokens have received, kept in pages of the KV pool until they are compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import ShardLayout, score_pages, score_width
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.device import to_device
from workers.kv.pool import KVPool

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoreTargets:
    """Where one decode step's attention is accumulated, for all scored tokens of a micro-batch.

    Attributes:
        tail: newest tokens of each cache whose attention is wanted.
        rows: row of the micro-batch, int64 [n].
        columns: place among the newest ``tail`` tokens of its cache, int64 [n].
        weights: what the attention is multiplied with, fp32 [n].
        scores: place among the pool's floats, int64 [layers, n].
    """

    tail: int
    rows: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


class GenerationScores:
    """Scores of generated tokens that are not compressed yet, fp32, per layer of each sequence.

    A chunk is scored by the recent window alone: by the ``window`` tokens behind it, the newest with
    weight ``distance_weight``, the oldest with 1, as the prompt's window is (arXiv 2405.12532).
    """

    def __init__(self, pool: KVPool, layout: ShardLayout) -> None:
        self._pool, self._layout = pool, layout
        self._pages: dict[int, npt.NDArray[np.int32]] = {}
        self._places: dict[int, Indices] = {}

    def pages(self, sequence: int) -> int:
        """Pages that hold the scores of ``sequence``."""
        return len(self._pages[sequence])

    def open(self, sequence: int, plan: KeepPlan) -> None:
        """Takes zeroed pages. Raises OutOfPagesError, changing nothing, when there are too few."""
        count = score_pages(plan, self._layout)
        pages = self._pool.allocator.allocate(count, (sequence, "scores"))
        width, per_page = score_width(plan), self._pool.page_bytes // 4
        layers = self._layout.end - self._layout.first
        index = np.arange(layers * width)
        places = pages[index // per_page].astype(np.int64) * per_page + index % per_page
        self._pages[sequence], self._places[sequence] = pages, places.reshape(layers, width)
        if count:
            self._pool.floats[self._on_device(places)] = 0

    def read(self, sequence: int) -> torch.Tensor:
        """A copy of the scores of ``sequence``, fp32 [layers, width]."""
        return self._pool.floats[self._on_device(self._places[sequence])]

    def write(self, sequence: int, scores: torch.Tensor) -> None:
        """Overwrites the scores of ``sequence`` with what ``read`` returned."""
        self._pool.floats[self._on_device(self._places[sequence])] = scores

    def close(self, sequence: int) -> None:
        """Gives the pages back."""
        self._pool.allocator.release(self._pages.pop(sequence), (sequence, "scores"))
        del self._places[sequence]

    def targets(
        self, sequences: Sequence[int], plans: Sequence[KeepPlan], uncompressed: Sequence[int]
    ) -> ScoreTargets | None:
        """Where a step's attention goes, once each sequence has its new token.

        Args:
            uncompressed: generated tokens of each sequence that compression has not passed over, the
                new one included.

        Returns:
            None if no sequence has a complete chunk behind its new token.
        """
        rows, back, weights, places = [], [], [], []
        for row, (sequence, plan, tokens) in enumerate(zip(sequences, plans, uncompressed, strict=True)):
            generation = plan.generation
            if generation is None or not generation.scores:
                continue
            complete = (tokens - 1) // generation.chunk * generation.chunk
            behind = min(complete, score_width(plan))  # drafts may go beyond what is scored
            if behind:
                rows.append(np.full(behind, row))
                back.append(tokens - np.arange(behind))
                weights.append(_weights(plan, generation, tokens, complete)[:behind])
                places.append(self._places[sequence][:, :behind])
        if not rows:
            return None
        tail = max(int(slots[0]) for slots in back)
        return ScoreTargets(
            tail=tail,
            rows=self._on_device(np.concatenate(rows)),
            columns=self._on_device(tail - np.concatenate(back)),
            weights=self._on_device(np.concatenate(weights)),
            scores=self._on_device(np.concatenate(places, axis=1)),
        )

    def add(self, places: torch.Tensor, attention: torch.Tensor) -> None:
        """Accumulates weighted ``attention`` at ``places``, both [layers, n]; see ``ScoreTargets``."""
        self._pool.floats.index_add_(0, places.reshape(-1), attention.reshape(-1))

    def take_chunk(self, sequence: int, chunk: int) -> torch.Tensor:
        """Removes and returns the scores of the oldest ``chunk`` tokens, fp32 [layers, chunk]."""
        places = self._on_device(self._places[sequence])
        scores = self._pool.floats[places]
        self._pool.floats[places] = torch.nn.functional.pad(scores[:, chunk:], (0, chunk))
        return scores[:, :chunk]

    def _on_device(self, array: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> torch.Tensor:
        return to_device(array, self._pool.rows.device)


def _weights(
    plan: KeepPlan, generation: GenerationPlan, tokens: int, behind: int
) -> npt.NDArray[np.float32]:
    """The new token's weight for each of the ``behind`` tokens in complete chunks."""
    age = tokens - 1 - np.arange(generation.chunk, behind + 1, generation.chunk)
    slope = (plan.distance_weight - 1) / max(1, generation.window - 1)
    return np.repeat(1 + slope * age, generation.chunk).astype(np.float32)
