"""What suspended sequences had on the device, on the host until they come back."""

from collections.abc import Iterable

import numpy as np
import torch

from workers.budget.pages import IntegrityError
from workers.kv.host import HostStore


class SuspendedSequences:
    """Rows of the pool and scores of sequences, in a ``HostStore`` that does not drop them."""

    def __init__(self, host: HostStore) -> None:
        self._host = host
        self._scores: dict[int, torch.Tensor] = {}

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._scores

    def put(self, sequence: int, layers: Iterable[torch.Tensor], scores: torch.Tensor) -> None:
        """Copies rows [n, 2, KV heads, head size] of each layer, which are given away, and scores.

        Raises IntegrityError, having kept nothing, when the host has no room for them.
        """
        name = _name(sequence)
        self._host.open(name, fixed=True)
        for layer, rows in enumerate(layers):
            self._host.spill(name, layer, [np.zeros((1, len(rows)), dtype=np.int32)], rows)
            if self._host.count(name, layer) < len(rows):
                self._host.close(name)
                raise IntegrityError(f"the host has no room for suspended sequence {sequence}")
        self._scores[sequence] = scores.cpu()

    def scores(self, sequence: int) -> torch.Tensor:
        """Its scores, in host memory."""
        return self._scores[sequence]

    def image(self, sequence: int, layer: int) -> torch.Tensor:
        """The rows of a layer, brought to the device."""
        rows = self._host.read(_name(sequence), layer)
        assert rows is not None  # it is fixed
        return rows

    def close(self, sequence: int) -> None:
        """Frees what the host holds of ``sequence``."""
        self._host.close(_name(sequence))
        del self._scores[sequence]


def _name(sequence: int) -> tuple[str, int]:
    return "suspended", sequence
