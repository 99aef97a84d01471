"""Evicted KV in host memory: bounded, least recently used sequences out first."""

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from workers.budget.pages import PAGE_TOKENS, IntegrityError, PageAllocator, pages_for
from workers.kv.entry import Positions
from workers.kv.link import Copy, HostLink
from workers.kv.page_table import PageTables, Rows
from workers.kv.pool import PagedLayers
from workers.kv.spill_counts import SpillCounts


@dataclass
class _Sequence:
    """What the store knows of one sequence; ``complete`` ends when any of its KV is dropped.

    What is ``fixed`` is not dropped for others.
    """

    positions: list[Positions]
    fixed: bool
    complete: bool = True
    counts: SpillCounts = field(default_factory=SpillCounts)
    writes: list[Copy] = field(default_factory=list)


class HostStore:
    """The spilled KV of the sequences of one shard, in pages of 16 tokens of one layer.

    A sequence is held whole or not at all: when memory runs out, the least recently used other
    sequence that is not fixed is dropped; one for which that does not make room is dropped itself. A
    page is not reused before the copy into it has completed.

    Attributes:
        like: rows without memory, [0, 2, KV heads, width].
    """

    def __init__(
        self,
        limit_bytes: int,
        link: HostLink,
        sequences: int,
        layers: int,
        max_tokens: int,
        like: torch.Tensor,
    ) -> None:
        """``like`` has the form of its rows, [*, 2, KV heads, width], and is on the device."""
        self._link = link
        self._layers = layers
        self._device = like.device
        row_shape = tuple(like.shape[1:])
        self._row_bytes = math.prod(row_shape) * like.dtype.itemsize
        self.page_bytes = PAGE_TOKENS * self._row_bytes
        pages = limit_bytes // self.page_bytes
        self.like = like.new_empty((0, *row_shape), device="meta")
        self._rows = link.host_memory((pages * PAGE_TOKENS, *row_shape), like.dtype)
        self._allocator = PageAllocator(pages)
        self._tables = PageTables(self._allocator, sequences, layers, max_tokens)
        self._sequences: OrderedDict[Hashable, _Sequence] = OrderedDict()
        # Whose destinations may be waited for on the device alone.
        self._reads: list[Copy] = []

    @property
    def limit_bytes(self) -> int:
        return self._allocator.pages * self.page_bytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use."""
        return self._allocator.pages_in_use * self.page_bytes

    def open(self, sequence: Hashable, fixed: bool = False, sets: int = 1) -> None:
        """Begins to keep books for ``sequence``, which is not dropped for others if it is ``fixed``."""
        empty = [np.zeros((sets, 0), dtype=np.int32) for _ in range(self._layers)]
        self._sequences[sequence] = _Sequence(empty, fixed)
        self._tables.open(sequence)

    def close(self, sequence: Hashable) -> SpillCounts:
        """Frees all that ``sequence`` holds. Returns what ``take_counts`` would."""
        counts = self.take_counts(sequence)
        self._await_writes(self._sequences[sequence])
        self._tables.close(sequence)
        del self._sequences[sequence]
        return counts

    def rename(self, sequence: Hashable, name: Hashable) -> None:
        """Calls ``sequence`` by another name."""
        self._tables.rename(sequence, name)
        self._sequences[name] = self._sequences.pop(sequence)

    def take_counts(self, sequence: Hashable) -> SpillCounts:
        """What became of ``sequence`` since this was asked last."""
        entry = self._sequences[sequence]
        counts, entry.counts = entry.counts, SpillCounts()
        return counts

    def positions(self, sequence: Hashable, layer: int) -> Positions:
        """Input positions of the tokens held of ``layer``, in the order of ``read``, [sets, n]."""
        return self._sequences[sequence].positions[layer]

    def spill(
        self, sequence: Hashable, first: int, positions: Sequence[Positions], kv: torch.Tensor
    ) -> None:
        """Copies evicted KV of the layers from ``first`` on to the host.

        Args:
            positions: of each layer, the input positions of its tokens, int32 [sets, tokens].
            kv: rows of all of them on the device, [n, 2, KV heads, width]; the caller gives them away and
                must not write to them any more.
        """
        entry = self._sequences[sequence]
        self._sequences.move_to_end(sequence)
        size = len(kv) * self._row_bytes
        entry.counts.spilled_bytes += size
        held = self._tables.lengths(sequence)[first : first + len(positions)]
        more = held + np.array([each.shape[1] for each in positions], dtype=np.int64)
        needed = int((pages_for(more) - pages_for(held)).sum())
        if not entry.complete or not self._make_room(needed, sequence):
            entry.counts.dropped_bytes += size
            self.drop(sequence)
            return
        self._tables.resize_layers(sequence, first, more)
        rows = self._tables.rows_of_layers(sequence, first, held, more)
        entry.writes = [copy for copy in entry.writes if not copy.done()]
        for start, end, row in _runs(rows):
            entry.writes.append(self._link.start(self._rows[row : row + end - start], kv[start:end]))
        for layer, new in enumerate(positions, first):
            entry.positions[layer] = np.concatenate([entry.positions[layer], new], axis=1)

    def exchange(
        self, sequence: Hashable, layer: int, freed: Rows, positions: Positions, kv: torch.Tensor
    ) -> None:
        """Puts evicted KV in the place of tokens that are not needed here any more.

        Args:
            freed: places of the latter in the order of ``positions``, ascending.
            positions, kv: of the former, as ``spill`` takes them.
        """
        entry = self._sequences[sequence]
        self._sequences.move_to_end(sequence)
        entry.counts.spilled_bytes += len(kv) * self._row_bytes
        held = self.count(sequence, layer)
        after = held - len(freed) + len(kv)
        needed = pages_for(after) - pages_for(held)
        if not entry.complete or not self._make_room(needed, sequence):
            entry.counts.dropped_bytes += len(kv) * self._row_bytes
            self.drop(sequence)
            return
        self._tables.resize(sequence, layer, max(held, after))
        rows = self._tables.rows(sequence, layer, 0, max(held, after))
        places, holes = np.split(freed, [min(len(freed), len(kv))])
        # What is left at the end moves into the holes that are left.
        holes = holes[holes < after]
        movers = np.setdiff1d(np.arange(after, held), freed)
        self._move(entry, rows[movers], rows[holes])
        places = np.concatenate([places, np.arange(held, after)])
        for start, end, row in _runs(rows[places]):
            entry.writes.append(self._link.start(self._rows[row : row + end - start], kv[start:end]))
        own = np.concatenate([entry.positions[layer], positions], axis=1)[:, : max(held, after)]
        own[:, holes], own[:, places] = own[:, movers], positions
        entry.positions[layer] = own[:, :after]
        self._tables.resize(sequence, layer, after)

    def shorten(self, sequence: Hashable, tokens: int) -> None:
        """Forgets those at position ``tokens`` and behind; they are in order, the same in each set."""
        entry = self._sequences[sequence]
        ends = np.array([np.searchsorted(each[0], tokens) for each in entry.positions])
        if (ends == self._tables.lengths(sequence)).all():
            return
        self._await_writes(entry)
        self._tables.resize_layers(sequence, 0, ends)
        entry.positions = [each[:, :end] for each, end in zip(entry.positions, ends, strict=True)]

    def count(self, sequence: Hashable, layer: int) -> int:
        """Tokens held of ``layer``."""
        return self._tables.length(sequence, layer)

    def start_read(self, sequence: Hashable, layer: int, kv: torch.Tensor) -> tuple[Copy, ...]:
        """Starts to bring the rows of ``layer`` back into ``kv`` [count, 2, KV heads, width].

        Bit for bit what was spilled, in the order of ``positions``. Nothing must be spilled or dropped
        of the sequence before the copies returned are done.
        """
        entry = self._sequences[sequence]
        self._sequences.move_to_end(sequence)
        self._await_writes(entry)
        rows = self._tables.rows(sequence, layer, 0, len(kv))
        entry.counts.recalled_bytes += len(kv) * self._row_bytes
        self._reads = [copy for copy in self._reads if not copy.done()]
        copies = tuple(
            self._link.start(kv[first:last], self._rows[row : row + last - first])
            for first, last, row in _runs(rows)
        )
        self._reads += copies
        return copies

    def view(self, sequences: Sequence[Hashable], layers: int) -> PagedLayers:
        """Where the KV of the first layers of sequences lies, to be read there.

        Nothing must be spilled or dropped of any before that is done.
        """
        for sequence in dict.fromkeys(sequences):
            self._sequences.move_to_end(sequence)
            self._await_writes(self._sequences[sequence])
        pages, lengths = (torch.from_numpy(each[:layers]) for each in self._tables.batch(sequences))
        return PagedLayers(self._rows, pages, lengths)

    def attend(self, sequences: Sequence[Hashable], layers: int) -> tuple[PagedLayers, Copy]:
        """As ``view``, of all that is there, and a copy that paces that.

        A sequence that comes more than once is read once.
        """
        size = 0
        for sequence in dict.fromkeys(sequences):
            attended = int(self._tables.lengths(sequence)[:layers].sum()) * self._row_bytes
            self._sequences[sequence].counts.attended_bytes += attended
            size += attended
        return self.view(sequences, layers), self._link.read(size)

    def count_recalled(self, sequences: Sequence[Hashable], tokens: Sequence[int]) -> Copy:
        """Notes that so many tokens of each sequence are read where they lie; a copy that paces that."""
        for sequence, count in zip(sequences, tokens, strict=True):
            self._sequences[sequence].counts.recalled_bytes += count * self._row_bytes
        return self._link.read(sum(tokens) * self._row_bytes)

    def read(self, sequence: Hashable, layer: int) -> torch.Tensor | None:
        """Brings the KV of ``layer`` back, as ``start_read`` does; None if it was dropped."""
        if not self._sequences[sequence].complete:
            return None
        shape = (self.count(sequence, layer), *self._rows.shape[1:])
        kv = torch.empty(shape, dtype=self._rows.dtype, device=self._device)
        for copy in self.start_read(sequence, layer, kv):
            copy.wait_on_device()
        return kv

    def check_integrity(self) -> None:
        """Raises IntegrityError unless tables, positions and pages agree."""
        self._tables.check_integrity()
        for sequence, entry in self._sequences.items():
            for layer, positions in enumerate(entry.positions):
                if positions.shape[1] != self._tables.length(sequence, layer):
                    raise IntegrityError(
                        f"layer {layer} of spilled sequence {sequence!r} has {positions.shape[1]} "
                        f"positions for {self._tables.length(sequence, layer)} tokens"
                    )

    def _make_room(self, pages: int, sequence: Hashable) -> bool:
        """Frees at least ``pages`` pages by dropping other sequences, oldest use first.

        Returns False and drops none when there would be too few even so.
        """
        if self._allocator.free_pages >= pages:
            return True
        droppable = [
            other
            for other, entry in self._sequences.items()
            if other != sequence and not entry.fixed and self._tables.pages_of(other)
        ]
        if self._allocator.free_pages + sum(map(self._tables.pages_of, droppable)) < pages:
            return False
        for other in droppable:
            if self._allocator.free_pages >= pages:
                break
            self.drop(other)
        return True

    def drop(self, sequence: Hashable) -> None:
        """Forgets all spilled KV of ``sequence``, and keeps none from now on."""
        entry = self._sequences[sequence]
        if not entry.complete:
            return
        self._await_writes(entry)
        entry.complete = False
        for layer, positions in enumerate(entry.positions):
            entry.counts.dropped_bytes += positions.shape[1] * self._row_bytes
            entry.positions[layer] = positions[:, :0]
            self._tables.resize(sequence, layer, 0)

    def _move(self, entry: _Sequence, movers: Rows, holes: Rows) -> None:
        """Moves rows of ``entry`` within the host's memory, which copies may be reading and writing."""
        self._await_writes(entry)
        if not len(holes):
            return
        for copy in self._reads:
            copy.wait()
        self._reads.clear()
        self._rows[torch.from_numpy(holes)] = self._rows[torch.from_numpy(movers)]

    def _await_writes(self, entry: _Sequence) -> None:
        for copy in entry.writes:
            copy.wait()
        entry.writes.clear()


def _runs(rows: Rows) -> list[tuple[int, int, int]]:
    """Splits ``rows`` where they are not consecutive: (first, last, row of first), last excluded."""
    if not len(rows):
        return []
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [(first, last, int(rows[first])) for first, last in pairwise(cuts)]
