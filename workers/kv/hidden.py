"""Hidden states of tokens that ``prune`` has dropped, on the host until they are lifted."""

from dataclasses import dataclass

import numpy as np
import torch

from workers.kv.entry import Positions
from workers.kv.host import HostStore
from workers.kv.rows import bytes_as_rows
from workers.kv.spill_counts import SpillCounts


@dataclass
class _Waiting:
    """Per layer, positions of each block of rows that was spilled; size and type of a hidden state."""

    blocks: list[list[Positions]]
    size: int = 0
    dtype: torch.dtype = torch.float32


class HiddenStore:
    """Keeps hidden states in a ``HostStore`` of KV rows, where they are dropped like spilled KV."""

    def __init__(self, host: HostStore, layers: int) -> None:
        """For ``layers`` layers, and what waits behind the last of them."""
        self._host, self._layers = host, layers
        self._waiting: dict[int, _Waiting] = {}

    def open(self, sequence: int) -> None:
        """Begins to keep books for ``sequence``."""
        self._host.open(_name(sequence))
        self._waiting[sequence] = _Waiting([[] for _ in range(self._layers + 1)])

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._waiting

    def close(self, sequence: int) -> None:
        """Frees all that ``sequence`` holds."""
        self._host.close(_name(sequence))
        del self._waiting[sequence]

    def rename(self, sequence: int, name: int) -> None:
        """Calls ``sequence`` by another name."""
        self._host.rename(_name(sequence), _name(name))
        self._waiting[name] = self._waiting.pop(sequence)

    def spill(self, sequence: int, layer: int, positions: Positions, hidden: torch.Tensor) -> None:
        """Copies ``hidden`` [rows, hidden] to the host, to wait before ``layer``; it is given away."""
        if not len(positions):
            return
        waiting = self._waiting[sequence]
        waiting.blocks[layer].append(positions)
        like = self._host.like
        # Never in fewer bits than they have, but where KV has too.
        flat = hidden.to(like.dtype if like.dtype.is_floating_point else hidden.dtype).view(1, -1)
        waiting.size, waiting.dtype = hidden.shape[1], flat.dtype
        rows = bytes_as_rows(flat, like)
        self._host.spill(_name(sequence), layer, [np.zeros((1, len(rows)), dtype=np.int32)], rows)

    def take(self, sequence: int, layer: int) -> tuple[Positions, torch.Tensor] | None:
        """Brings back all that waits before ``layer``: positions, and hidden states [rows, hidden].

        None if there is nothing, or it was dropped.
        """
        waiting, name = self._waiting[sequence], _name(sequence)
        blocks, waiting.blocks[layer] = waiting.blocks[layer], []
        rows = self._host.read(name, layer) if blocks else None
        if rows is None:
            return None
        self._host.exchange(name, layer, np.arange(len(rows)), np.zeros((1, 0), dtype=np.int32), rows[:0])
        parts, at = [], 0
        for positions in blocks:
            size = len(positions) * waiting.size * waiting.dtype.itemsize
            end = at - (-size // rows[:1].nbytes)
            own = rows[at:end].view(-1).view(torch.uint8)[:size]
            parts.append(own.view(waiting.dtype).view(-1, waiting.size))
            at = end
        return np.concatenate(blocks), torch.cat(parts)

    def take_counts(self, sequence: int) -> SpillCounts:
        """See ``HostStore.take_counts``."""
        return self._host.take_counts(_name(sequence))


def _name(sequence: int) -> tuple[str, int]:
    return "hidden", sequence
