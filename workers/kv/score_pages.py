"""Scores of sequences, in pages of the KV pool, as they take the device's memory."""

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import floats_pages
from workers.device import to_device
from workers.kv.pool import KVPool

Indices = npt.NDArray[np.int64]


class ScorePages:
    """For each sequence a table of fp32 [layers, width], all 0 at first."""

    def __init__(self, pool: KVPool, layers: int) -> None:
        self._pool, self._layers = pool, layers
        self._pages: dict[int, npt.NDArray[np.int32]] = {}
        self._places: dict[int, Indices] = {}

    def pages(self, sequence: int) -> int:
        """Pages that hold the scores of ``sequence``."""
        return len(self._pages[sequence])

    def open(self, sequence: int, width: int) -> None:
        """Takes zeroed pages. Raises OutOfPagesError, changing nothing, when there are too few."""
        count = floats_pages(width * self._layers, self._pool.page_bytes)
        pages = self._pool.allocator.allocate(count, (sequence, "scores"))
        per_page = self._pool.page_bytes // 4
        index = np.arange(self._layers * width)
        places = pages[index // per_page].astype(np.int64) * per_page + index % per_page
        self._pages[sequence], self._places[sequence] = pages, places.reshape(self._layers, width)
        if count:
            self._pool.floats[self._on_device(sequence)] = 0

    def close(self, sequence: int) -> None:
        """Gives the pages back."""
        self._pool.allocator.release(self._pages.pop(sequence), (sequence, "scores"))
        del self._places[sequence]

    def places(self, sequence: int) -> Indices:
        """Where the scores lie among the pool's floats, int64 [layers, width]."""
        return self._places[sequence]

    def read(self, sequence: int) -> torch.Tensor:
        """A copy of the scores of ``sequence``, fp32 [layers, width]."""
        return self._pool.floats[self._on_device(sequence)]

    def write(self, sequence: int, scores: torch.Tensor) -> None:
        """Overwrites the scores of ``sequence`` with what ``read`` returned."""
        self._pool.floats[self._on_device(sequence)] = scores

    def add(self, places: torch.Tensor, values: torch.Tensor) -> None:
        """Adds ``values`` at ``places`` among the pool's floats, both [layers, n]."""
        self._pool.floats.index_add_(0, places.reshape(-1), values.reshape(-1))

    def take(self, sequence: int, count: int) -> torch.Tensor:
        """Removes and returns the first ``count`` scores of every layer, fp32 [layers, count]."""
        places = self._on_device(sequence)
        scores = self._pool.floats[places]
        self._pool.floats[places] = torch.nn.functional.pad(scores[:, count:], (0, count))
        return scores[:, :count]

    def _on_device(self, sequence: int) -> torch.Tensor:
        return to_device(self._places[sequence], self._pool.rows.device)
