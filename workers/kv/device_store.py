"""What sequences hold on the device: the KV of their slots, their scores, and the index of spilled keys."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.pages import IntegrityError
from workers.device import to_device
from workers.kv.entry import CacheNeeds
from workers.kv.page_table import Lengths, PageTables, Rows
from workers.kv.pool import KVPool, PagedLayers, PagedStep
from workers.kv.recent import RecentRows
from workers.kv.rows import decode, encode, row_format
from workers.kv.score_pages import ScorePages
from workers.kv.sink_keys import Layers, SinkKeys
from workers.kv.spilled_keys import SpilledKeys

Slots = npt.NDArray[np.int64]
# At once, so that they stay in a processor's cache on their way.
MOVED_ROWS = 1024


class DeviceStore:
    """The pages of a pool that sequences own.

    Attributes:
        scores: of sequences; all have some, of a width that may be 0.
        sinks: the first tokens' keys as they were first stored, of which there may be 0.
        keys: the index of keys on the host, of those that want one.
        recent: the newest tokens in a finer format, where the pool's wants one.
    """

    def __init__(self, pool: KVPool, tables: PageTables, layers: int) -> None:
        self.pool, self.layers = pool, layers
        self._tables = tables
        self.scores, self.sinks = ScorePages(pool, layers), SinkKeys(pool, layers)
        self.keys = SpilledKeys(pool, tables.sequences, layers, tables.max_tokens)
        finer = row_format(pool.rows.dtype).recent
        self.recent = RecentRows(pool, layers) if finer else None

    @property
    def table_bytes(self) -> int:
        """Bytes of one sequence's table."""
        return self._tables.bytes_per_sequence

    def open(self, sequence: int, needs: CacheNeeds) -> None:
        """Begins a sequence. Raises OutOfPagesError, changing nothing, when what it needs finds no room."""
        with ExitStack() as undo:
            self.scores.open(sequence, needs.score_rows, needs.score_width)
            undo.callback(self.scores.close, sequence)
            self.sinks.open(sequence, needs.sinks)
            undo.callback(self.sinks.close, sequence)
            if self.recent:
                self.recent.open(sequence)
            undo.pop_all()
        self._tables.open(sequence)
        if needs.indexed:
            self.keys.open(sequence)

    def close(self, sequence: int) -> None:
        """Gives all pages of ``sequence`` back."""
        self.scores.close(sequence)
        self.sinks.close(sequence)
        self._tables.close(sequence)
        if self.recent:
            self.recent.close(sequence)
        if sequence in self.keys:
            self.keys.close(sequence)

    def reopen(self, old: int, sequence: int, needs: CacheNeeds, lengths: Lengths) -> None:
        """Goes on with the first ``lengths`` slots of ``old``, and its index, as ``sequence``.

        Raises OutOfPagesError, having freed scores alone, when scores find no room.
        """
        self.scores.close(old)
        self.scores.open(sequence, needs.score_rows, needs.score_width)
        self.sinks.rename(old, sequence)
        self._tables.rename(old, sequence)
        self._tables.resize_layers(sequence, 0, lengths)
        if self.recent:
            self.recent.rename(old, sequence)
        if old in self.keys:
            self.keys.rename(old, sequence)

    def pages(self, sequence: int) -> int:
        """Pages that ``sequence`` owns."""
        recent = self.recent.pages(sequence) if self.recent else 0
        return (
            self._tables.pages_of(sequence)
            + self.scores.pages(sequence)
            + self.sinks.pages(sequence)
            + self.keys.pages(sequence)
            + recent
        )

    def lengths(self, sequence: int) -> Lengths:
        """Tokens in every layer of ``sequence``."""
        return self._tables.lengths(sequence)

    def length(self, sequence: int, layer: int) -> int:
        """Tokens in ``layer`` of ``sequence``."""
        return self._tables.length(sequence, layer)

    def read(self, sequence: int, layer: int, start: int = 0) -> torch.Tensor:
        """A copy of the KV of ``layer`` from slot ``start`` on: [tokens, 2, KV heads, head size].

        Such that to write it again changes nothing, see ``workers.kv.rows``.
        """
        return decode(self.pool.read(self._slots(sequence, layer, start)))

    def write(self, sequence: int, layer: int, kv: torch.Tensor) -> None:
        """Makes ``kv`` [tokens, 2, KV heads, head size] all that ``layer`` has."""
        self._put(sequence, layer, encode(kv, self.pool.rows.dtype))

    def extend(
        self, sequences: Sequence[int], counts: Mapping[int, int], beyond: PagedLayers | None
    ) -> PagedStep:
        """Makes room for a new token of each of ``sequences`` in every layer; says where all KV lies.

        One may be there several times in a row, with as many tokens: ``counts`` says how many of each.
        ``beyond`` is what they attend to beside what is on the device.
        """
        if len(counts) == len(sequences):
            slots = self._tables.extend(sequences)
            pages, lengths = self._tables.batch(sequences)
        else:
            slots = np.concatenate([self._grow(*grown) for grown in counts.items()], axis=1)
            pages, lengths = self._tables.batch(sequences)
            # A token does not attend to those behind it.
            behind = np.concatenate([np.arange(count)[::-1] for count in counts.values()])
            lengths -= behind.astype(np.int32)
        return PagedStep(
            self.pool.rows,
            self._on_device(slots),
            self._on_device(pages),
            self._on_device(lengths),
            spilled=beyond,
        )

    def shrink(self, sequence: int, tokens: int) -> None:
        """Frees the last ``tokens`` slots of every layer."""
        self._tables.resize_layers(sequence, 0, self._tables.lengths(sequence) - tokens)

    def cut(
        self, sequence: int, first: int, starts: Lengths, order: Slots, lengths: Lengths
    ) -> torch.Tensor:
        """Cuts slots out of some layers: of those from its ``starts`` on, all but ``lengths``.

        Those that stay move up.

        Args:
            first: of the layers; they are as many as ``starts``, int64 [layers].
            order: of all slots from there on, which are as many in each layer, those that stay first, int64
                [layers, sets, slots].

        Returns:
            The rows that were cut, layer by layer, [tokens, 2, KV heads, width].
        """
        count = order.shape[2]
        slots = self._tables.rows_of_layers(sequence, first, starts, starts + count).reshape(-1, count)
        stays = np.arange(count) < lengths[:, None]
        ordered = np.take_along_axis(slots[:, None], order, axis=2).swapaxes(1, 2)
        gone = self.pool.read_sets(self._on_device(ordered[~stays]))
        # What stays moves to slots before its own, so that no block overwrites what a later one reads.
        sources, targets = (
            torch.split(self._on_device(each[stays]), MOVED_ROWS) for each in (ordered, slots)
        )
        for source, target in zip(sources, targets, strict=True):
            self.pool.write(target, self.pool.read_sets(source))
        self._tables.resize_layers(sequence, first, starts + lengths)
        return gone

    def read_first_keys(self, sequence: int, layers: Layers, count: int) -> torch.Tensor:
        """A copy of the keys of the first ``count`` slots of layers, [layers, count, KV heads, width]."""
        return self.pool.read(self._first_slots(sequence, layers, count))[..., 0, :, :]

    def write_first_keys(self, sequence: int, layers: Layers, keys: torch.Tensor) -> None:
        """Overwrites the keys of the first slots of layers, [layers, slots, KV heads, width]."""
        rows = self._first_slots(sequence, layers, keys.shape[1]).view(-1)
        kv = self.pool.read(rows)
        kv[:, 0] = keys.flatten(0, 1)
        self.pool.write(rows, kv)

    def _first_slots(self, sequence: int, layers: Layers, count: int) -> torch.Tensor:
        rows = [self._tables.rows(sequence, layer, 0, count) for layer in layers.tolist()]
        return self._on_device(np.stack(rows))

    def image(self, sequence: int, layer: int) -> torch.Tensor:
        """A copy of all rows of the pool that ``layer`` has: of its KV, the newest tokens, the index."""
        parts = [self.pool.read(self._slots(sequence, layer))]
        if self.recent:
            parts.append(self.recent.image(sequence, layer))
        if sequence in self.keys:
            parts.append(self.keys.read(sequence, layer))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def restore(self, sequence: int, layer: int, image: torch.Tensor, tokens: int) -> None:
        """Makes ``image``, of so many ``tokens``, all that ``layer`` has, bit for bit."""
        rings = self.recent.rows_each if self.recent else 0
        rows, ring, index = image.tensor_split([tokens, tokens + rings])
        self._put(sequence, layer, rows)
        if self.recent:
            self.recent.restore(sequence, layer, ring)
        if sequence in self.keys:
            self.keys.write(sequence, layer, index)

    def check_integrity(self, sequences: Sequence[int]) -> None:
        """Raises IntegrityError unless tables agree, and all pages in use are those of ``sequences``."""
        self._tables.check_integrity()
        self.keys.tables.check_integrity()
        owned, in_use = sum(map(self.pages, sequences)), self.pool.allocator.pages_in_use
        if owned != in_use:
            raise IntegrityError(f"{in_use} pages are in use, sequences own {owned}")

    def _put(self, sequence: int, layer: int, rows: torch.Tensor) -> None:
        self._tables.resize(sequence, layer, len(rows))
        self.pool.write(self._slots(sequence, layer), rows)

    def _grow(self, sequence: int, count: int) -> Rows:
        """Makes every layer hold ``count`` tokens more: their rows, [layers, count]."""
        before = self._tables.lengths(sequence)
        self._tables.resize_layers(sequence, 0, before + count)
        rows: Rows = self._tables.rows_of_layers(sequence, 0, before, before + count)
        return rows.reshape(self.layers, count)

    def _slots(self, sequence: int, layer: int, start: int = 0) -> torch.Tensor:
        end = self._tables.length(sequence, layer)
        return self._on_device(self._tables.rows(sequence, layer, start, end))

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self.pool.rows.device)
