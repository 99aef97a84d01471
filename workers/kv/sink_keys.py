"""Keys of sequences' first tokens as they were first stored, in pages of the KV pool."""

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import KEYS_PER_PAGE
from workers.device import to_device
from workers.kv.pool import KVPool

Layers = npt.NDArray[np.int64]


class SinkKeys:
    """For each sequence a table of keys, [layers, sinks, KV heads, width], in the format of the pool."""

    def __init__(self, pool: KVPool, layers: int) -> None:
        self._pool, self._layers = pool, layers
        self._keys = pool.rows.view(-1, *pool.rows.shape[2:])
        self._pages: dict[int, npt.NDArray[np.int32]] = {}
        self._sinks: dict[int, int] = {}

    def open(self, sequence: int, sinks: int) -> None:
        """Takes pages. Raises OutOfPagesError, changing nothing, when there are too few."""
        pages = -(-self._layers * sinks // KEYS_PER_PAGE)
        self._pages[sequence] = self._pool.allocator.allocate(pages, _name(sequence))
        self._sinks[sequence] = sinks

    def close(self, sequence: int) -> None:
        """Gives the pages back."""
        self._pool.allocator.release(self._pages.pop(sequence), _name(sequence))
        del self._sinks[sequence]

    def rename(self, sequence: int, name: int) -> None:
        """Calls ``sequence`` by another name."""
        self._pool.allocator.hand_over(self._pages[sequence], _name(sequence), _name(name))
        self._pages[name], self._sinks[name] = self._pages.pop(sequence), self._sinks.pop(sequence)

    def pages(self, sequence: int) -> int:
        """Pages that ``sequence`` has here."""
        return len(self._pages[sequence])

    def read(self, sequence: int, layers: Layers) -> torch.Tensor:
        """A copy of the keys of some layers, [layers, sinks, KV heads, width]."""
        keys = self._keys.index_select(0, self._places(sequence, layers))
        return keys.view(len(layers), -1, *keys.shape[1:])

    def write(self, sequence: int, layers: Layers, keys: torch.Tensor) -> None:
        """Overwrites the keys of some layers with what ``read`` returned."""
        self._keys.index_copy_(0, self._places(sequence, layers), keys.flatten(0, 1))

    def _places(self, sequence: int, layers: Layers) -> torch.Tensor:
        sinks = self._sinks[sequence]
        index = (layers[:, None] * sinks + np.arange(sinks)).reshape(-1)
        pages = self._pages[sequence][index // KEYS_PER_PAGE].astype(np.int64)
        return to_device(pages * KEYS_PER_PAGE + index % KEYS_PER_PAGE, self._keys.device)


def _name(sequence: int) -> tuple[int, str]:
    return sequence, "sinks"
