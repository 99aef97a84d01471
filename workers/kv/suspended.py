"""What suspended sequences had on the device, on the host until they come back."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from workers.budget.pages import IntegrityError
from workers.kv.host import HostStore
from workers.kv.rows import bytes_as_rows


class SuspendedSequences:
    """Rows of the pool, scores and sinks' keys of sequences, in a ``HostStore`` that does not drop them."""

    def __init__(self, host: HostStore) -> None:
        self._host = host
        self._beside: dict[int, tuple[torch.Tensor, ...]] = {}
        self._sizes: dict[int, list[int]] = {}  # rows of each layer

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._beside

    def put(self, sequence: int, layers: Iterable[torch.Tensor], *beside: torch.Tensor) -> None:
        """Copies the pool's rows of each layer, [n, 2, KV heads, width], given away, and what is beside.

        Raises IntegrityError, having kept nothing, when the host has no room for them.
        """
        name = _name(sequence)
        self._host.open(name, fixed=True)
        sizes = []
        for layer, image in enumerate(layers):
            sizes.append(len(image))
            rows = bytes_as_rows(image.view(1, -1), self._host.like)
            self._host.spill(name, layer, [np.zeros((1, len(rows)), dtype=np.int32)], rows)
            if self._host.count(name, layer) < len(rows):
                self._host.close(name)
                raise IntegrityError(f"the host has no room for suspended sequence {sequence}")
        self._beside[sequence], self._sizes[sequence] = tuple(each.cpu() for each in beside), sizes

    def beside(self, sequence: int) -> tuple[torch.Tensor, ...]:
        """What it has beside rows, in host memory."""
        return self._beside[sequence]

    def image(self, sequence: int, layer: int, like: torch.Tensor) -> torch.Tensor:
        """The rows of a layer, brought to the device, as ``like`` [*, 2, KV heads, width]."""
        rows = self._host.read(_name(sequence), layer)
        assert rows is not None  # it is fixed
        shape = (self._sizes[sequence][layer], *like.shape[1:])
        size = math.prod(shape) * like.dtype.itemsize
        return rows.view(-1).view(torch.uint8)[:size].view(like.dtype).view(shape)

    def close(self, sequence: int) -> None:
        """Frees what the host holds of ``sequence``."""
        self._host.close(_name(sequence))
        del self._beside[sequence], self._sizes[sequence]


def _name(sequence: int) -> tuple[str, int]:
    return "suspended", sequence
