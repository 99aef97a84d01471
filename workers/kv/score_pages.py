"""Scores of sequences, in pages of the KV pool, as they take the device's memory."""

import math

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import floats_pages
from workers.device import to_device
from workers.kv.pool import KVPool

Indices = npt.NDArray[np.int64]


class ScorePages:
    """For each sequence a table of fp32 [layers, rows, width], all 0 at first."""

    def __init__(self, pool: KVPool, layers: int) -> None:
        self._pool, self._layers = pool, layers
        self._pages: dict[int, npt.NDArray[np.int32]] = {}
        self._shapes: dict[int, tuple[int, int, int]] = {}
        self._places: dict[int, Indices] = {}

    def pages(self, sequence: int) -> int:
        """Pages that hold the scores of ``sequence``."""
        return len(self._pages[sequence])

    def open(self, sequence: int, rows: int, width: int) -> None:
        """Takes zeroed pages. Raises OutOfPagesError, changing nothing, when there are too few."""
        shape = self._layers, rows, width
        count = floats_pages(math.prod(shape), self._pool.page_bytes)
        self._pages[sequence] = self._pool.allocator.allocate(count, (sequence, "scores"))
        self._shapes[sequence] = shape
        self.write(sequence, torch.zeros(shape, device=self._pool.rows.device))

    def close(self, sequence: int) -> None:
        """Gives the pages back."""
        self._pool.allocator.release(self._pages.pop(sequence), (sequence, "scores"))
        del self._shapes[sequence]
        self._places.pop(sequence, None)

    def places(self, sequence: int) -> Indices:
        """Where the scores lie among the pool's floats, int64 [layers, rows, width]."""
        if sequence not in self._places:  # every step of those that want them asks
            shape, per_page = self._shapes[sequence], self._pool.page_bytes // 4
            index = np.arange(math.prod(shape))
            places = self._pages[sequence][index // per_page].astype(np.int64) * per_page + index % per_page
            self._places[sequence] = places.reshape(shape)
        return self._places[sequence]

    def read(self, sequence: int) -> torch.Tensor:
        """A copy of the scores of ``sequence``, fp32 [layers, rows, width]."""
        shape = self._shapes[sequence]
        return self._all.index_select(0, self._on_device(sequence)).view(-1)[: math.prod(shape)].view(shape)

    def write(self, sequence: int, scores: torch.Tensor) -> None:
        """Overwrites the scores of ``sequence`` with what ``read`` returned."""
        pages = self._on_device(sequence)
        flat = scores.reshape(-1)
        whole = torch.nn.functional.pad(flat, (0, len(pages) * self._all.shape[1] - len(flat)))
        self._all.index_copy_(0, pages, whole.view(-1, self._all.shape[1]))

    def add_to_all(self, sequence: int, values: torch.Tensor, decay: float) -> None:
        """Multiplies all scores with ``decay``, and adds ``values`` [layers, rows, n] to the first n."""
        scores = self.read(sequence)
        if decay < 1:
            scores *= decay
        scores[..., : values.shape[2]] += values
        self.write(sequence, scores)

    def put(self, sequence: int, layer: int, first: int, scores: torch.Tensor) -> None:
        """Overwrites the scores of a layer from column ``first`` on with ``scores`` [rows, n]."""
        own = self.read(sequence)
        own[layer, :, first : first + scores.shape[1]] = scores
        self.write(sequence, own)

    def add(self, places: torch.Tensor, values: torch.Tensor) -> None:
        """Adds ``values`` at ``places`` among the pool's floats, both [layers, n]."""
        self._pool.floats.index_add_(0, places.reshape(-1), values.reshape(-1))

    def take(self, sequence: int, count: int) -> torch.Tensor:
        """Removes and returns the first ``count`` scores of every row, fp32 [layers, rows, count]."""
        scores = self.read(sequence)
        self.write(sequence, torch.nn.functional.pad(scores[..., count:], (0, count)))
        return scores[..., :count]

    @property
    def _all(self) -> torch.Tensor:
        """All of the pool's pages as fp32 [pages, floats of one]."""
        return self._pool.floats.view(-1, self._pool.page_bytes // 4)

    def _on_device(self, sequence: int) -> torch.Tensor:
        return to_device(self._pages[sequence].astype(np.int64), self._pool.rows.device)
