"""The KV cache of one shard: what every layer of every sequence holds, on the device and the host."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pyramidserve.types import LayerReceipt
from workers.budget.footprint import ShardLayout, floats_pages
from workers.budget.pages import IntegrityError
from workers.budget.released import ReleasedSequence
from workers.device import to_device
from workers.kv.entry import CachedSequence, CacheNeeds, GatheredLayer, Positions
from workers.kv.hidden import HiddenStore
from workers.kv.host import HostStore
from workers.kv.page_table import Lengths, PageTables, Rows
from workers.kv.pool import KVPool, PagedLayers, PagedStep
from workers.kv.score_pages import ScorePages
from workers.kv.spilled_keys import SpilledKeys
from workers.kv.suspended import SuspendedSequences


class ShardCache:
    """Pages, positions, scores and spilled KV of all sequences on a shard; it knows no policy.

    Layers count from 0 within the shard.
    """

    def __init__(self, pool: KVPool, tables: PageTables, host: HostStore, layout: ShardLayout) -> None:
        self.pool, self.host = pool, host
        self._tables, self._first_layer = tables, layout.first
        self.layers = layout.end - layout.first
        self.scores = ScorePages(pool, self.layers)
        self.hidden = HiddenStore(host, self.layers)
        self.keys = SpilledKeys(pool, tables.sequences, self.layers, tables.max_tokens)
        self._suspended = SuspendedSequences(host)
        self._sequences: dict[int, CachedSequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def positions(self, sequence: int, layer: int) -> Positions:
        """Input positions of the tokens that ``layer`` holds on the device, in order of slots."""
        entry = self._sequences[sequence]
        known = entry.positions[layer]
        if sequence in self._suspended:
            return known
        newest = self._tables.length(sequence, layer) - len(known)
        return np.concatenate((known, np.arange(entry.tokens - newest, entry.tokens, dtype=np.int32)))

    def open(self, sequence: int, needs: CacheNeeds) -> None:
        """Begins a sequence. Raises OutOfPagesError, changing nothing, when scores find no room."""
        self.scores.open(sequence, needs.score_width)
        self._tables.open(sequence)
        self.host.open(sequence, fixed=needs.whole)
        if needs.indexed:
            self.keys.open(sequence)
        if needs.hidden:
            self.hidden.open(sequence)
        empty = [np.zeros(0, dtype=np.int32) for _ in range(self.layers)]
        self._sequences[sequence] = CachedSequence(needs, empty, [0] * self.layers)

    def reopen(self, old: int, sequence: int, needs: CacheNeeds, reused: int) -> None:
        """Goes on with what the first ``reused`` tokens of ``old`` left, as ``sequence``.

        Raises OutOfPagesError, having freed scores alone, when scores find no room.
        """
        known = [self.positions(old, layer) for layer in range(self.layers)]
        known = [positions[: np.searchsorted(positions, reused)] for positions in known]
        self.scores.close(old)
        self.scores.open(sequence, needs.score_width)
        self._tables.rename(old, sequence)
        self._tables.resize_layers(sequence, 0, np.array([len(positions) for positions in known]))
        self.host.rename(old, sequence)
        if old in self.keys:
            self.keys.rename(old, sequence)
        if old in self.hidden:
            self.hidden.rename(old, sequence)
        del self._sequences[old]
        self._sequences[sequence] = CachedSequence(needs, known, [0] * self.layers)
        nothing = known[0][:0], self.pool.rows[:0]
        for layer in range(self.layers):
            later = np.flatnonzero(self.host.positions(sequence, layer) >= reused)
            self.host.exchange(sequence, layer, later, *nothing)

    def gather(self, sequence: int, layer: int, recall: bool) -> GatheredLayer:
        """A copy of the KV of ``layer``; with ``recall`` also of that on the host."""
        positions = self.positions(sequence, layer)
        places = np.full(len(positions), -1)
        kv = self.read(sequence, layer)
        if not recall or not (spilled := self.host.count(sequence, layer)):
            return GatheredLayer(positions, places, kv)
        back = kv.new_empty((spilled, *kv.shape[1:]))
        for copy in self.host.start_read(sequence, layer, back):
            copy.wait_on_device()
        positions = np.concatenate([positions, self.host.positions(sequence, layer)])
        places = np.concatenate([places, np.arange(spilled)])
        order = positions.argsort()
        return GatheredLayer(positions[order], places[order], torch.cat([kv, back])[self._on_device(order)])

    def replace(self, sequence: int, layer: int, tokens: GatheredLayer, keep: torch.Tensor) -> None:
        """Makes ``layer`` hold those of ``tokens`` that are to be kept, int64, ascending.

        Those of the others that are not on the host go there; those that come from there leave it.
        """
        entry = self._sequences[sequence]
        kept = keep.cpu().numpy()
        stays = np.zeros(len(tokens.places), dtype=bool)
        stays[kept] = True
        back = tokens.places[kept]
        freed = np.sort(back[back >= 0])
        gone = ~stays & (tokens.places < 0)
        evicted = tokens.kv[self._on_device(np.flatnonzero(gone))]
        self.host.exchange(sequence, layer, freed, tokens.positions[gone], evicted)
        self._tables.resize(sequence, layer, len(kept))
        if sequence in self.keys:
            order = np.searchsorted(tokens.positions, self.host.positions(sequence, layer))
            self.keys.clear(sequence, layer)
            self.keys.append(sequence, layer, tokens.kv[self._on_device(order), 0], 0)
        self.pool.write(self._rows(sequence, layer, 0, len(kept)), tokens.kv[keep])
        entry.positions[layer] = tokens.positions[kept]
        entry.recalled[layer] += len(freed)
        self._note_peak(sequence)

    def store_prompt(
        self,
        sequence: int,
        layer: int,
        positions: Positions,
        kv: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> None:
        """Stores a prompt's KV of one layer, and spills what the layer does not keep.

        Args:
            positions: input positions of the rows, int32 [n].
            kv: [n, 2, KV heads, head size].
            keep: rows to keep on the device, int64, ascending; None keeps all.
        """
        if keep is not None:
            stays = keep.cpu().numpy()
            gone = np.delete(np.arange(len(kv)), stays)
            self._spill(sequence, layer, [positions[gone]], kv[self._on_device(gone)])
            kv, positions = kv[keep], positions[stays]
        self._tables.resize(sequence, layer, len(kv))
        self.pool.write(self._rows(sequence, layer, 0, len(kv)), kv)
        self._sequences[sequence].positions[layer] = positions
        self._note_peak(sequence)

    def extend(self, sequences: Sequence[int], beyond: PagedLayers | None = None) -> PagedStep:
        """Makes room for a new token of each of ``sequences`` in every layer; says where all KV lies.

        One may be there several times in a row, with as many tokens. ``beyond`` is what they attend to
        beside what is on the device.
        """
        counts = Counter(sequences)
        for sequence, count in counts.items():
            self._sequences[sequence].fed += count
        if len(counts) == len(sequences):
            slots = self._tables.extend(sequences)
        else:
            slots = np.concatenate([self._grow(*grown) for grown in counts.items()], axis=1)
        pages, lengths = self._tables.batch(sequences)
        # A token does not attend to those behind it.
        lengths -= np.concatenate([np.arange(count)[::-1] for count in counts.values()]).astype(np.int32)
        return PagedStep(
            self.pool.rows,
            self._on_device(slots),
            self._on_device(pages),
            self._on_device(lengths),
            beyond,
        )

    def take_back(self, sequence: int, tokens: int) -> None:
        """Frees the slots of the newest ``tokens`` tokens in every layer."""
        self._note_peak(sequence)
        self._tables.resize_layers(sequence, 0, self._tables.lengths(sequence) - tokens)
        self._sequences[sequence].fed -= tokens

    def cut(self, sequence: int, starts: Lengths, stays: npt.NDArray[np.bool_]) -> None:
        """Cuts slots out of every layer: of as many from its ``starts`` on, those that do not stay.

        What is behind them moves up; what is cut is spilled.

        Args:
            starts: int64 [layers].
            stays: bool [layers, slots].
        """
        self._note_peak(sequence)
        entry, ends = self._sequences[sequence], self._tables.lengths(sequence)
        positions = [self.positions(sequence, layer) for layer in range(self.layers)]
        rows = self._tables.rows_of_layers(sequence, 0, starts, ends).reshape(self.layers, -1)
        tokens = self.pool.read(self._on_device(rows))
        behind = np.ones((self.layers, rows.shape[1] - stays.shape[1]), dtype=bool)
        stays = np.concatenate((stays, behind), axis=1)
        gone = [held[start:][~stay] for held, start, stay in zip(positions, starts, stays, strict=True)]
        lengths = stays.sum(axis=1)
        places = rows[np.arange(rows.shape[1]) < lengths[:, None]]
        self.pool.write(self._on_device(places), tokens[self._on_device(stays)])
        self._tables.resize_layers(sequence, 0, starts + lengths)
        entry.positions = [
            np.concatenate((held[:start], held[start:][stay]))
            for held, start, stay in zip(positions, starts, stays, strict=True)
        ]
        self._spill(sequence, 0, gone, tokens[self._on_device(~stays)])

    def read(self, sequence: int, layer: int, start: int = 0) -> torch.Tensor:
        """A copy of the KV of ``layer`` from slot ``start`` on: [tokens, 2, KV heads, head size]."""
        return self.pool.read(self._rows(sequence, layer, start, self._tables.length(sequence, layer)))

    def suspend(self, sequence: int) -> None:
        """Moves all that ``sequence`` holds on the device to the host, which must have room for it.

        Raises IntegrityError, changing nothing, if it has not.
        """
        self._note_peak(sequence)
        entry, layers = self._sequences[sequence], range(self.layers)
        positions = [self.positions(sequence, layer) for layer in layers]
        # Copies, so that the pages may be used again while they are on their way.
        rows = (self.read(sequence, layer) for layer in layers)
        if sequence in self.keys:
            rows = (torch.cat((kv, self.keys.read(sequence, layer))) for layer, kv in enumerate(rows))
        self._suspended.put(sequence, rows, self.scores.read(sequence))
        entry.positions = positions
        self._close(sequence)

    def resume(self, sequence: int) -> None:
        """Moves all of a suspended sequence back to the device, bit for bit.

        Raises OutOfPagesError when there is no room for it; call it only when there is.
        """
        entry = self._sequences[sequence]
        self.scores.open(sequence, entry.needs.score_width)
        self.scores.write(sequence, to_device(self._suspended.scores(sequence), self.pool.rows.device))
        self._tables.open(sequence)
        if entry.needs.indexed:
            self.keys.open(sequence)
        lengths = np.array([len(positions) for positions in entry.positions])
        self._tables.resize_layers(sequence, 0, lengths)
        for layer, length in enumerate(lengths.tolist()):
            rows = self._suspended.rows(sequence, layer)
            self.pool.write(self._rows(sequence, layer, 0, length), rows[:length])
            if entry.needs.indexed:
                self.keys.write(sequence, layer, rows[length:])
        self._suspended.close(sequence)

    def report(self, sequence: int) -> ReleasedSequence:
        """What ``sequence`` held and moved; counts begin anew."""
        if sequence not in self._suspended:
            self._note_peak(sequence)
        entry, counts = self._sequences[sequence], self.host.take_counts(sequence)
        if sequence in self.hidden:
            counts = counts.plus(self.hidden.take_counts(sequence))
        report = ReleasedSequence(
            layers=tuple(self._layer_receipt(sequence, layer) for layer in range(self.layers)),
            peak_pages=entry.peak_pages,
            score_pages=floats_pages(entry.needs.score_width * self.layers, self.pool.page_bytes),
            page_bytes=self.pool.page_bytes,
            table_bytes=self._tables.bytes_per_sequence,
            spilled_bytes=counts.spilled_bytes,
            recalled_bytes=counts.recalled_bytes,
            dropped_bytes=counts.dropped_bytes,
            attended_bytes=counts.attended_bytes,
        )
        entry.peak_pages, entry.recalled = 0, [0] * self.layers
        return report

    def release(self, sequence: int) -> ReleasedSequence:
        """Frees all that ``sequence`` holds on the device and the host."""
        report = self.report(sequence)
        if sequence in self._suspended:
            self._suspended.close(sequence)
        else:
            self._close(sequence)
        del self._sequences[sequence]
        self.host.close(sequence)
        if sequence in self.hidden:
            self.hidden.close(sequence)
        return report

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pool, tables, positions and host store agree."""
        self._tables.check_integrity()
        self.keys.tables.check_integrity()
        self.host.check_integrity()
        active = self._sequences.keys() - self._suspended.sequences
        owned = sum(map(self._pages, active))
        if owned != self.pool.allocator.pages_in_use:
            raise IntegrityError(
                f"{self.pool.allocator.pages_in_use} pages are in use, sequences own {owned}"
            )
        for sequence in active:
            for layer in range(self.layers):
                positions = self.positions(sequence, layer)
                length = self._tables.length(sequence, layer)
                if len(positions) != length or (np.diff(positions) <= 0).any():
                    raise IntegrityError(
                        f"layer {layer} of sequence {sequence} holds {length} tokens, which are not at "
                        f"positions {positions.tolist()}"
                    )

    def _close(self, sequence: int) -> None:
        """Gives all pages of ``sequence`` back."""
        self.scores.close(sequence)
        self._tables.close(sequence)
        if sequence in self.keys:
            self.keys.close(sequence)

    def _pages(self, sequence: int) -> int:
        return self._tables.pages_of(sequence) + self.scores.pages(sequence) + self.keys.pages(sequence)

    def _spill(self, sequence: int, first: int, positions: Sequence[Positions], kv: torch.Tensor) -> None:
        """Spills as ``HostStore.spill`` does, and indexes the keys."""
        before = [self.host.count(sequence, first + number) for number in range(len(positions))]
        self.host.spill(sequence, first, positions, kv)
        if sequence in self.keys:
            spilled = torch.split(kv[:, 0], [len(each) for each in positions])
            for layer, (keys, count) in enumerate(zip(spilled, before, strict=True), first):
                self.keys.append(sequence, layer, keys, count)

    def _grow(self, sequence: int, count: int) -> Rows:
        """Makes every layer hold ``count`` tokens more: their rows, [layers, count]."""
        before = self._tables.lengths(sequence)
        self._tables.resize_layers(sequence, 0, before + count)
        rows: Rows = self._tables.rows_of_layers(sequence, 0, before, before + count)
        return rows.reshape(self.layers, count)

    def _layer_receipt(self, sequence: int, layer: int) -> LayerReceipt:
        entry = self._sequences[sequence]
        positions = self.positions(sequence, layer)
        prompt = int((positions < entry.needs.prompt_tokens).sum())
        spilled = self.host.count(sequence, layer)
        return LayerReceipt(
            layer=self._first_layer + layer,
            prompt_kept=prompt,
            generated_kept=len(positions) - prompt,
            spilled=spilled,
            dropped=entry.tokens - len(positions) - spilled,
            recalled=entry.recalled[layer],
        )

    def _note_peak(self, sequence: int) -> None:
        """Pages only grow between cuts, so noting them there and at the end finds the peak."""
        entry = self._sequences[sequence]
        entry.peak_pages = max(entry.peak_pages, self._pages(sequence))

    def _rows(self, sequence: int, layer: int, start: int, end: int) -> torch.Tensor:
        return self._on_device(self._tables.rows(sequence, layer, start, end))

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self.pool.rows.device)
