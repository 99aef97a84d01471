"""The KV cache of one shard: what every layer of every sequence holds, on the device and the host."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import ShardLayout, floats_pages
from workers.budget.kv_format import RECENT_TOKENS
from workers.budget.pages import IntegrityError
from workers.budget.released import ReleasedSequence
from workers.device import to_device
from workers.kv.device_store import DeviceStore, Slots
from workers.kv.entry import (
    CachedSequence,
    CacheNeeds,
    GatheredLayer,
    Positions,
    among,
    in_order,
    indices,
    take_sets,
    unbroken_from,
    with_rows,
)
from workers.kv.hidden import HiddenStore
from workers.kv.host import HostStore
from workers.kv.near_sinks import NearSinks, Turn, unturned
from workers.kv.page_table import Lengths, PageTables
from workers.kv.pool import KVPool, PagedLayers, PagedStep
from workers.kv.rows import decode, encode, recoded
from workers.kv.suspended import SuspendedSequences
from workers.kv.windows import not_yet_there, unseen_slots


class ShardCache:
    """Where each token of every sequence is, by its position; it knows no policy.

    Layers count from 0 within the shard. In one that has a window a token attends to the newest tokens
    alone; what is older is kept, as a turn of a session may go back to it.

    A sequence that has outgrown its table, and so the model's context, has nothing on the host any more: no
    turn could attend to all of that.

    Attributes:
        device, host: what holds the tokens.
        windows: of every layer, the newest tokens that one attends to; 0: all.
        hidden: what holds hidden states, in the host's memory too.
    """

    def __init__(
        self,
        pool: KVPool,
        tables: PageTables,
        host: HostStore,
        layout: ShardLayout,
        windows: Sequence[int] = (),
        turn: Turn = unturned,
    ) -> None:
        """``windows``: of every layer, the newest tokens that one attends to; 0: all. Empty: all in all."""
        self.layers, self._first_layer = layout.end - layout.first, layout.first
        self.windows = tuple(windows) or (0,) * self.layers
        self._longest = tables.max_tokens
        self.device, self.host = DeviceStore(pool, tables, self.layers), host
        self._sinks = NearSinks(self.device, turn)
        self.hidden = HiddenStore(host, self.layers)
        self._suspended = SuspendedSequences(host)
        self._sequences: dict[int, CachedSequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def mirrors(self) -> bool:
        """Whether the host has another format than the device."""
        return self.host.like.dtype != self.device.pool.rows.dtype

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def positions(self, sequence: int, layer: int) -> Positions:
        """Input positions of what ``layer`` holds on the device, in order of slots, int32 [sets, slots]."""
        entry = self._sequences[sequence]
        known = entry.positions[layer]
        if sequence in self._suspended:
            return known
        newest = self.device.length(sequence, layer) - known.shape[1]
        return with_rows(known, np.arange(entry.tokens - newest, entry.tokens, dtype=np.int32))

    def open(self, sequence: int, needs: CacheNeeds) -> None:
        """Begins a sequence. Raises OutOfPagesError, changing nothing, when scores find no room."""
        self.device.open(sequence, needs)
        self.host.open(sequence, fixed=needs.whole, sets=needs.sets)
        if needs.hidden:
            self.hidden.open(sequence)
        empty = [np.zeros((needs.sets, 0), dtype=np.int32) for _ in range(self.layers)]
        unbroken, moved = np.zeros((2, self.layers), dtype=np.int64)
        self._sequences[sequence] = CachedSequence(needs, empty, [0] * self.layers, unbroken, moved)

    def reopen(self, old: int, sequence: int, needs: CacheNeeds, reused: int) -> None:
        """Goes on with what the first ``reused`` tokens of ``old`` left, as ``sequence``.

        What KV heads have of their own must not be among what is taken back, see ``KeepPlan.shared``.
        Raises OutOfPagesError, having freed scores alone, when scores find no room.
        """
        known = [self.positions(old, layer) for layer in range(self.layers)]
        known = [positions[:, : np.searchsorted(positions[0], reused)] for positions in known]
        self.device.reopen(old, sequence, needs, np.array([positions.shape[1] for positions in known]))
        self.host.rename(old, sequence)
        if old in self.hidden:
            self.hidden.rename(old, sequence)
        unbroken, moved = np.full(self.layers, reused), self._sequences.pop(old).moved
        self._sequences[sequence] = CachedSequence(needs, known, [0] * self.layers, unbroken, moved, reused)
        nothing = known[0][:, :0], self.device.pool.rows[:0]
        for layer in range(self.layers):
            later = np.flatnonzero(self.host.positions(sequence, layer)[0] >= reused)
            self.host.exchange(sequence, layer, later, *nothing)

    def gather(self, sequence: int, layer: int, recall: bool) -> GatheredLayer:
        """A copy of the KV of ``layer``; with ``recall`` also of that on the host.

        Sinks are as near to what follows as all that is gathered makes them; ``replace`` is to come next.
        """
        positions = self.positions(sequence, layer)
        places = np.full(positions.shape, -1)
        kv = self.device.read(sequence, layer)
        spilled = self.host.count(sequence, layer) if recall else 0
        self._sinks.move_gathered(sequence, layer, self._sequences[sequence], kv, len(kv) + spilled)
        if not spilled:
            return GatheredLayer(positions, places, kv)
        if self._sequences[sequence].needs.mirrored:  # all is there
            positions, places, kv = positions[:, :0], places[:, :0], kv[:0]
        like = self.host.like
        back = torch.empty((spilled, *like.shape[1:]), dtype=like.dtype, device=kv.device)
        for copy in self.host.start_read(sequence, layer, back):
            copy.wait_on_device()
        positions = np.concatenate([positions, self.host.positions(sequence, layer)], axis=1)
        return in_order(positions, with_rows(places, np.arange(spilled)), torch.cat([kv, decode(back)]))

    def replace(self, sequence: int, layer: int, tokens: GatheredLayer, keep: Slots) -> None:
        """Makes ``layer`` hold those of ``tokens`` that are to be kept, int64 [sets, kept], ascending.

        Those of the others that are not on the host go there; those that come from there leave it, but
        where it has all.
        """
        entry = self._sequences[sequence]
        self._forget_longer(sequence)
        stays = among(keep, tokens.tokens)
        back = np.take_along_axis(tokens.places, keep, axis=1)
        kept = np.take_along_axis(tokens.positions, keep, axis=1)
        held = self.host.positions(sequence, layer)
        gone = ~stays & (tokens.places < 0)
        if entry.needs.mirrored:
            gone, places = tokens.places < 0, np.arange(0)
            own = zip(kept, self.positions(sequence, layer), strict=True)
            back[np.stack([np.isin(*each) for each in own])] = -1
        # A row of the host may be needed by some heads alone.
        elif len(keep) > 1 and (tokens.places >= 0).any():
            gone, places = ~stays, np.arange(held.shape[1])
        elif entry.needs.whole and any(self.windows):  # in order, so that a window is all from a place on
            gone = ~stays
            places = np.arange(not_yet_there(gone[0], tokens.positions[0], held[0]), held.shape[1])
        else:
            places = np.sort(back[back >= 0])
        leaving = indices(gone)
        evicted = encode(take_sets(tokens.kv, self._on_device(leaving)), self.host.like.dtype)
        self.host.exchange(
            sequence, layer, places, np.take_along_axis(tokens.positions, leaving, axis=1), evicted
        )
        if sequence in self.device.keys:
            spilled = self.host.positions(sequence, layer)
            order = np.stack(
                [np.searchsorted(*each) for each in zip(tokens.positions, spilled, strict=True)]
            )
            self.device.keys.clear(sequence, layer)
            self.device.keys.append(sequence, layer, take_sets(tokens.kv, self._on_device(order))[:, 0], 0)
        self._write(sequence, layer, kept, take_sets(tokens.kv, self._on_device(keep)))
        entry.recalled[layer] += round((back >= 0).sum() / len(back))
        self._note_peak(sequence)

    def store_prompt(
        self,
        sequence: int,
        layer: int,
        positions: Positions,
        kv: torch.Tensor,
        keep: Slots | None,
    ) -> None:
        """Stores a prompt's KV of one layer, and spills what the layer does not keep.

        Args:
            positions: input positions of the rows, int32 [n].
            kv: [n, 2, KV heads, head size].
            keep: rows to keep on the device, int64 [sets, kept], ascending; None keeps all.
        """
        entry, like = self._sequences[sequence], self.host.like
        held = np.tile(positions, (entry.needs.sets, 1))
        self._sinks.begin(sequence, layer, entry, kv)
        if entry.needs.mirrored:
            self.host.spill(sequence, layer, [held], encode(kv, like.dtype))
        elif keep is not None:
            leaving = indices(~among(keep, len(kv)))
            evicted = encode(take_sets(kv, self._on_device(leaving)), like.dtype)
            self._spill(sequence, layer, [positions[leaving]], evicted)
        if keep is not None:
            kv, held = take_sets(kv, self._on_device(keep)), positions[keep]
        self._write(sequence, layer, held, kv)
        self._note_peak(sequence)

    def extend(self, sequences: Sequence[int], beyond: PagedLayers | None = None) -> PagedStep:
        """Makes room for the next token of each of ``sequences``, as ``DeviceStore.extend`` does.

        Each attends to what is within the windows, of ``beyond`` too, which ``HostStore.attend`` returns.
        """
        counts = Counter(sequences)
        for sequence, count in counts.items():
            self._sequences[sequence].fed += count
        step = self._with_recent(self.device.extend(sequences, counts, beyond), counts)
        if not any(self.windows):
            return step
        starts = self._on_device(self.starts(sequences, on_host=False))
        if beyond is not None:
            beyond = replace(beyond, starts=torch.from_numpy(self.starts(sequences, on_host=True)))
        return replace(step, starts=starts, spilled=beyond)

    def starts(self, sequences: Sequence[int], on_host: bool) -> npt.NDArray[np.int32]:
        """Slots before those that the newest tokens attend to, see ``unseen_slots``.

        On the device, or ``on_host``, of sequences that must not lose any there.
        """
        positions = self.host.positions if on_host else self._places
        return unseen_slots(sequences, self.windows, self._sequences, positions)

    def mirror(self, sequence: int, rows: torch.Tensor) -> None:
        """Puts its newest tokens on the host, where all before are: [layers, tokens, 2, KV heads, width].

        ``rows`` are as the host's, and given away.
        """
        entry, count = self._sequences[sequence], rows.shape[1]
        positions = np.arange(entry.tokens - count, entry.tokens, dtype=np.int32)
        held = [np.tile(positions, (entry.needs.sets, 1))] * self.layers
        self.host.spill(sequence, 0, held, rows.flatten(0, 1))

    def _places(self, sequence: int, layer: int) -> Positions:
        """As ``positions``, of sinks those that they have moved to."""
        return self._sequences[sequence].places(layer, self.positions(sequence, layer))

    def take_back(self, sequence: int, tokens: int) -> None:
        """Forgets the newest ``tokens`` tokens."""
        self._note_peak(sequence)
        self.device.shrink(sequence, tokens)
        entry = self._sequences[sequence]
        entry.fed -= tokens
        if entry.needs.mirrored:
            self.host.shorten(sequence, entry.tokens)

    def cut(self, sequence: int, first: int, starts: Lengths, stays: npt.NDArray[np.bool_]) -> None:
        """Spills slots of layers from ``first`` on: of as many from ``starts`` on, those that do not stay.

        Args:
            starts: int64 [layers]; as many tokens are behind each.
            stays: bool [layers, sets, slots], as many in each set of a layer.
        """
        self._note_peak(sequence)
        entry = self._sequences[sequence]
        held = [self.positions(sequence, layer) for layer in range(first, first + len(starts))]
        behind = held[0].shape[1] - int(starts[0]) - stays.shape[2]
        stays = np.concatenate((stays, np.ones((*stays.shape[:2], behind), dtype=bool)), axis=2)
        order = np.argsort(~stays, axis=2, kind="stable")
        lengths = stays[:, 0].sum(axis=1)
        evicted = self.device.cut(sequence, first, starts, order, lengths)
        spilled: list[Positions] = []
        for layer, (own, start, moved, length) in enumerate(zip(held, starts, order, lengths, strict=True)):
            ordered = np.take_along_axis(own[:, start:], moved, axis=1)
            stayed = np.concatenate((own[:, :start], ordered[:, :length]), axis=1)
            entry.positions[first + layer] = stayed
            if self.device.recent:
                since = unbroken_from(stayed, entry.tokens, RECENT_TOKENS)
                entry.unbroken[first + layer] = max(since, entry.unbroken[first + layer])
            spilled.append(ordered[:, length:])
        if not entry.needs.mirrored:
            self._spill(sequence, first, spilled, recoded(evicted, self.host.like.dtype))
        self._sinks.move(sequence, first, first + len(starts), entry)

    def suspend(self, sequence: int) -> None:
        """Moves all that ``sequence`` holds on the device to the host, which must have room for it.

        Raises IntegrityError, changing nothing, if it has not.
        """
        self._note_peak(sequence)
        layers = range(self.layers)
        positions = [self.positions(sequence, layer) for layer in layers]
        # Copies, so that the pages may be used again while they are on their way.
        images = (self.device.image(sequence, layer) for layer in layers)
        sinks = self.device.sinks.read(sequence, np.arange(self.layers))
        self._suspended.put(sequence, images, self.device.scores.read(sequence), sinks)
        self._sequences[sequence].positions = positions
        self.device.close(sequence)

    def resume(self, sequence: int) -> None:
        """Moves all of a suspended sequence back to the device, bit for bit.

        Raises OutOfPagesError when there is no room for it; call it only when there is.
        """
        entry = self._sequences[sequence]
        self.device.open(sequence, entry.needs)
        scores, sinks = map(self._on_device, self._suspended.beside(sequence))
        self.device.scores.write(sequence, scores)
        self.device.sinks.write(sequence, np.arange(self.layers), sinks)
        for layer, positions in enumerate(entry.positions):
            image = self._suspended.image(sequence, layer, self.device.pool.rows)
            self.device.restore(sequence, layer, image, positions.shape[1])
        self._suspended.close(sequence)

    def report(self, sequence: int) -> ReleasedSequence:
        """What ``sequence`` held and moved; counts begin anew."""
        if sequence not in self._suspended:
            self._note_peak(sequence)
        entry, counts = self._sequences[sequence], self.host.take_counts(sequence)
        if sequence in self.hidden:
            counts = counts.plus(self.hidden.take_counts(sequence))
        page_bytes = self.device.pool.page_bytes
        report = ReleasedSequence(
            layers=tuple(
                entry.receipt(layer, self._first_layer, self.positions(sequence, layer), held)
                for layer, held in enumerate(self.host.count(sequence, each) for each in range(self.layers))
            ),
            peak_pages=entry.peak_pages,
            score_pages=floats_pages(
                entry.needs.score_width * entry.needs.score_rows * self.layers, page_bytes
            ),
            page_bytes=page_bytes,
            table_bytes=self.device.table_bytes,
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
            self.device.close(sequence)
        del self._sequences[sequence]
        self.host.close(sequence)
        if sequence in self.hidden:
            self.hidden.close(sequence)
        return report

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pool, tables, positions and host store agree."""
        active = [sequence for sequence in self._sequences if sequence not in self._suspended]
        self.device.check_integrity(active)
        self.host.check_integrity()
        for sequence in active:
            for layer in range(self.layers):
                positions, length = self.positions(sequence, layer), self.device.length(sequence, layer)
                if positions.shape[1] != length or (np.diff(positions) <= 0).any():
                    raise IntegrityError(
                        f"layer {layer} of sequence {sequence} holds {length} tokens, which are not at "
                        f"positions {positions.tolist()}"
                    )

    def _write(self, sequence: int, layer: int, positions: Positions, kv: torch.Tensor) -> None:
        """Makes ``kv`` of the tokens at ``positions``, the newest of all last, all that ``layer`` has."""
        entry = self._sequences[sequence]
        self.device.write(sequence, layer, kv)
        entry.positions[layer] = positions
        self._sinks.move(sequence, layer, layer + 1, entry)
        if self.device.recent is None:
            return
        since = entry.unbroken[layer] = unbroken_from(positions, entry.tokens, RECENT_TOKENS)
        if newest := entry.tokens - since:
            self.device.recent.write(sequence, layer, since, kv[-newest:])

    def _with_recent(self, step: PagedStep, fed: Counter[int]) -> PagedStep:
        """``step`` with the newest tokens in a finer format, if there is one; ``fed``: of each sequence."""
        if self.device.recent is None:
            return step
        sequences, counts = list(fed.elements()), list(fed.values())
        entries = [self._sequences[sequence] for sequence in fed]
        new = [np.arange(-count, 0) + entry.tokens for entry, count in zip(entries, counts, strict=True)]
        positions = np.concatenate(new)
        unbroken = np.repeat(np.stack([entry.unbroken for entry in entries], axis=1), counts, axis=1)
        windows = np.array([window or RECENT_TOKENS for window in self.windows])[:, None]
        newest = np.minimum(np.minimum(windows, RECENT_TOKENS), positions + 1 - unbroken)
        slots = self.device.recent.slots(sequences, positions)
        return replace(
            step,
            recent=self.device.recent.batch(sequences, positions, newest),
            recent_slots=self._on_device(slots),
        )

    def _spill(self, sequence: int, first: int, positions: Sequence[Positions], rows: torch.Tensor) -> None:
        """Spills as ``HostStore.spill`` does, and indexes the keys."""
        self._forget_longer(sequence)
        before = [self.host.count(sequence, first + number) for number in range(len(positions))]
        self.host.spill(sequence, first, positions, rows)
        if sequence in self.device.keys:
            spilled = torch.split(decode(rows[:, 0]), [each.shape[1] for each in positions])
            for layer, (keys, count) in enumerate(zip(spilled, before, strict=True), first):
                self.device.keys.append(sequence, layer, keys, count)

    def _forget_longer(self, sequence: int) -> None:
        """Drops what a sequence has on the host that has become too long for it to be of use."""
        if self._sequences[sequence].tokens > self._longest:
            self.host.drop(sequence)

    def _note_peak(self, sequence: int) -> None:
        """Pages only grow between cuts, so noting them there and at the end finds the peak."""
        entry = self._sequences[sequence]
        entry.peak_pages = max(entry.peak_pages, self.device.pages(sequence))

    def _on_device(self, array: npt.NDArray[np.generic] | torch.Tensor) -> torch.Tensor:
        return to_device(array, self.device.pool.rows.device)
