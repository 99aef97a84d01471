"""Keeps first tokens as near to the newest as if what is gone had never been between them."""

from collections.abc import Callable

import numpy as np
import torch

from workers.kv.device_store import DeviceStore
from workers.kv.entry import CachedSequence
from workers.kv.rows import decode, encode
from workers.kv.sink_keys import Layers

# Keys [n, KV heads, head size], of layers of the shard and rotated anew by so many positions, both int64
# [n], in a sequence of at most so many tokens.
Turn = Callable[[torch.Tensor, Layers, Layers, int], torch.Tensor]


def unturned(keys: torch.Tensor, layers: Layers, distances: Layers, length: int) -> torch.Tensor:
    """A ``Turn`` of keys that have no rotation."""
    return keys


class NearSinks:
    """Rotates the sinks' keys of sequences that have some (``CacheNeeds.sinks``) whenever tokens go.

    Always from what was first stored, so that roundings do not add up, however often that is.
    """

    def __init__(self, device: DeviceStore, turn: Turn) -> None:
        self._device, self._turn = device, turn

    def begin(self, sequence: int, layer: int, entry: CachedSequence, kv: torch.Tensor) -> None:
        """Notes how near sinks are in a prompt, of whose rows not all were read; ``kv`` is of those."""
        if not entry.needs.sinks or len(kv) == entry.tokens:
            return
        entry.moved[layer] = entry.tokens - len(kv)
        keys = kv[: entry.needs.sinks, 0]
        back = np.full(len(keys), -entry.moved[layer])
        first = self._turn(keys, np.full(len(keys), layer), back, entry.needs.length)
        self._device.sinks.write(
            sequence, np.array([layer]), encode(first, self._device.pool.rows.dtype)[None]
        )

    def move(self, sequence: int, first: int, end: int, entry: CachedSequence) -> None:
        """Rotates those of layers ``first`` to ``end`` anew that have another distance to the rest."""
        if not entry.needs.sinks:
            return
        gone = entry.tokens - self._device.lengths(sequence)
        layers = np.arange(first, end)
        layers = layers[gone[layers] != entry.moved[layers]]
        if not len(layers):
            return
        unmoved = layers[entry.moved[layers] == 0]
        if len(unmoved):
            keys = self._device.read_first_keys(sequence, unmoved, entry.needs.sinks)
            self._device.sinks.write(sequence, unmoved, keys)
        moved = encode(self._moved(sequence, layers, gone[layers], entry), self._device.pool.rows.dtype)
        self._device.write_first_keys(sequence, layers, moved)
        entry.moved[layers] = gone[layers]

    def move_gathered(
        self, sequence: int, layer: int, entry: CachedSequence, kv: torch.Tensor, tokens: int
    ) -> None:
        """Rotates those in a layer's ``kv`` anew, so many ``tokens`` of which will be gathered."""
        gone = entry.reused - tokens
        if entry.moved[layer] not in (0, gone):
            sinks = kv[: entry.needs.sinks, 0]
            moved = self._moved(sequence, np.array([layer]), np.array([gone]), entry)
            sinks[:] = moved[0, : len(sinks)]
            entry.moved[layer] = gone

    def _moved(
        self, sequence: int, layers: Layers, distances: Layers, entry: CachedSequence
    ) -> torch.Tensor:
        """Keys of layers, as far from where they were: [layers, sinks, KV heads, head size]."""
        keys, needs = decode(self._device.sinks.read(sequence, layers)), entry.needs
        own, far = (np.repeat(each, needs.sinks) for each in (layers, distances))
        return self._turn(keys.flatten(0, 1), own, far, needs.length).view(keys.shape)
