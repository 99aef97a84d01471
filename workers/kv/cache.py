"""The KV cache of one shard: what every layer of every sequence holds, on the device and the host."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pyramidserve.types import LayerReceipt
from workers.budget.footprint import ShardLayout, score_pages
from workers.budget.pages import IntegrityError
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.budget.released import ReleasedSequence
from workers.device import to_device
from workers.kv.entry import CachedSequence, GatheredLayer, Positions
from workers.kv.hidden import HiddenStore
from workers.kv.host import HostStore
from workers.kv.link import Copy
from workers.kv.page_table import Lengths, PageTables, Rows
from workers.kv.pool import KVPool, PagedLayers, PagedStep
from workers.kv.scores import GenerationScores, ScoreTargets
from workers.kv.spilled_keys import SpilledKeys
from workers.policies.select import best_of_chunk, complement

# With recall "step", a new token attends to one of so many tokens on the host.
RECALLED_OF = 16


class ShardCache:
    """Pages, positions, scores and spilled KV of all sequences on a shard.

    Layers count from 0 within the shard.
    """

    def __init__(self, pool: KVPool, tables: PageTables, host: HostStore, layout: ShardLayout) -> None:
        self.pool, self.host = pool, host
        self._tables, self._layout = tables, layout
        self.layers = layout.end - layout.first
        self._scores = GenerationScores(pool, layout)
        self.hidden = HiddenStore(host, self.layers)
        self._keys = SpilledKeys(pool, tables.sequences, self.layers, tables.max_tokens)
        self._sequences: dict[int, CachedSequence] = {}
        # Their scores, in host memory; their KV is in the host store.
        self._suspended: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def plan(self, sequence: int) -> KeepPlan:
        """The plan of an open sequence."""
        return self._sequences[sequence].plan

    def positions(self, sequence: int, layer: int) -> Positions:
        """Input positions of the tokens that ``layer`` holds on the device, in order of slots."""
        entry = self._sequences[sequence]
        known = entry.positions[layer]
        if sequence in self._suspended:
            return known
        end = entry.plan.prompt_tokens + entry.generated + entry.unverified
        newest = self._tables.length(sequence, layer) - len(known)
        return np.concatenate((known, np.arange(end - newest, end, dtype=np.int32)))

    def open(self, sequence: int, plan: KeepPlan) -> None:
        """Begins a sequence. Raises OutOfPagesError, changing nothing, when scores find no room."""
        self._scores.open(sequence, plan)
        self._tables.open(sequence)
        self.host.open(sequence, fixed=plan.spills_all)
        if plan.indexes:
            self._keys.open(sequence)
        if plan.spills_hidden:
            self.hidden.open(sequence)
        empty = [np.zeros(0, dtype=np.int32) for _ in range(self.layers)]
        self._sequences[sequence] = CachedSequence(plan, empty, recalled=[0] * self.layers)

    def reopen(self, old: int, sequence: int, plan: KeepPlan, reused: int) -> None:
        """Goes on with what the first ``reused`` tokens of ``old`` left, as ``sequence``.

        Raises OutOfPagesError, having freed scores alone, when scores find no room.
        """
        known = [self.positions(old, layer) for layer in range(self.layers)]
        known = [own[: np.searchsorted(own, reused)] for own in known]
        self._scores.close(old)
        self._scores.open(sequence, plan)
        self._tables.rename(old, sequence)
        self._tables.resize_layers(sequence, 0, np.array([len(own) for own in known]))
        self.host.rename(old, sequence)
        if old in self._keys:
            self._keys.rename(old, sequence)
        if old in self.hidden:
            self.hidden.rename(old, sequence)
        del self._sequences[old]
        self._sequences[sequence] = CachedSequence(plan, known, recalled=[0] * self.layers)
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
        if sequence in self._keys:
            order = np.searchsorted(tokens.positions, self.host.positions(sequence, layer))
            self._keys.clear(sequence, layer)
            self._keys.append(sequence, layer, tokens.kv[self._on_device(order), 0], 0)
        self.pool.write(self._rows(sequence, layer, 0, len(kept)), tokens.kv[keep])
        entry.positions[layer] = tokens.positions[kept]
        entry.recalled[layer] += len(freed)
        entry.plan = entry.plan.keeping(self._layout.first + layer, len(kept))
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
            keep: rows to keep on the device, int64; None keeps all.
        """
        if keep is not None:
            evicted = complement(keep, len(kv))
            self._spill(sequence, layer, [positions[evicted.cpu().numpy()]], kv[evicted])
            kv, positions = kv[keep], positions[keep.cpu().numpy()]
        self._tables.resize(sequence, layer, len(kv))
        self.pool.write(self._rows(sequence, layer, 0, len(kv)), kv)
        self._sequences[sequence].positions[layer] = positions
        self._note_peak(sequence)

    def extend(self, sequences: Sequence[int]) -> PagedStep:
        """Makes room for a new token of each of ``sequences`` in every layer; says where all KV lies.

        One may be there several times in a row, with as many tokens.
        """
        counts = Counter(sequences)
        if len(counts) == len(sequences):
            return self._paged(sequences, self._tables.extend(sequences))
        grown = [
            self._grow(sequence, self._tables.lengths(sequence), count)
            for sequence, count in counts.items()
        ]
        return self._paged(sequences, np.concatenate(grown, axis=1), list(counts.values()))

    def read(self, sequence: int, layer: int, start: int = 0) -> torch.Tensor:
        """A copy of the KV of ``layer`` from slot ``start`` on: [tokens, 2, KV heads, head size]."""
        return self.pool.read(self._rows(sequence, layer, start, self._tables.length(sequence, layer)))

    def recalls(self, sequences: Sequence[int]) -> list[int]:
        """Which rows of a decode step attend to tokens on the host too."""
        return [row for row, sequence in enumerate(sequences) if sequence in self._keys]

    def recall(self, sequence: int, layer: int, query: torch.Tensor, tail: int) -> torch.Tensor:
        """The KV that a new token, its own included, attends to: on the device, and the best on the host.

        Args:
            query: [heads, head size].
            tail: newest tokens that come first, without the new one, which is last.

        Returns:
            [tokens, 2, KV heads, head size].
        """
        length, spilled = self._tables.length(sequence, layer), self.host.count(sequence, layer)
        rows = self._rows(sequence, layer, 0, length)
        newest = max(0, length - 1 - tail)
        rows = torch.cat((rows[newest:-1], rows[:newest], rows[-1:]))
        if not spilled:
            return self.pool.read(rows)
        best = self._keys.best(sequence, layer, query, spilled, -(-spilled // RECALLED_OF))
        kv = self.pool.rows.new_empty((length + len(best), *self.pool.rows.shape[1:]))
        copy = self.host.start_read_of(sequence, layer, best, kv[length - 1 : -1])
        torch.index_select(self.pool.rows, 0, rows[:-1], out=kv[: length - 1])
        kv[-1] = self.pool.rows[rows[-1]]
        copy.wait_on_device()
        return kv

    def score_targets(self, sequences: Sequence[int]) -> ScoreTargets | None:
        """Where the attention of the step's new tokens is to be accumulated; None if nowhere."""
        entries = [self._sequences[sequence] for sequence in sequences]
        come: Counter[int] = Counter()
        uncompressed = []
        for sequence, entry in zip(sequences, entries, strict=True):
            come[sequence] += 1
            uncompressed.append(entry.uncompressed + entry.unverified + come[sequence])
        return self._scores.targets(sequences, [entry.plan for entry in entries], uncompressed)

    def add_scores(self, sequences: Sequence[int], targets: ScoreTargets, shares: torch.Tensor) -> None:
        """Accumulates attention to the newest tokens, fp32 [layers, sequences, targets.tail].

        That of a draft counts once it is verified.
        """
        attention = shares[:, targets.rows, targets.columns] * targets.weights
        drafting = [row for row, key in enumerate(sequences) if self._sequences[key].plan.drafts]
        for row in drafting:
            own = targets.rows == row
            seen = (targets.scores[:, own], attention[:, own])
            self._sequences[sequences[row]].attention.append(seen)
        if drafting:
            others = ~torch.isin(targets.rows, self._on_device(np.array(drafting)))
            self._scores.add(targets.scores[:, others], attention[:, others])
        else:
            self._scores.add(targets.scores, attention)

    def end_step(self, sequences: Sequence[int]) -> None:
        """Counts the token appended to every layer, and compresses chunks that are due."""
        for sequence in sequences:
            entry = self._sequences[sequence]
            entry.unverified += 1
            if not entry.plan.drafts:
                self._count(sequence, 1)

    def settle(self, sequence: int, generated: int, drafts: bool) -> None:
        """Ends a verification: of what it fed, so many tokens stay that there are ``generated`` in all.

        ``drafts``: such as have come since stay too.
        """
        entry = self._sequences[sequence]
        if not entry.verifying and (drafts or not entry.unverified):
            return
        self._note_peak(sequence)
        verified = generated - entry.generated
        self._tables.resize_layers(
            sequence, 0, self._tables.lengths(sequence) - (entry.unverified - verified)
        )
        entry.unverified, entry.verifying = verified, False
        for places, attention in entry.attention[:verified]:
            self._scores.add(places, attention)
        entry.attention.clear()
        self._count(sequence, verified)

    def verify(self, sequences: Sequence[int], rows: Sequence[int]) -> tuple[PagedStep, Copy]:
        """Makes room for new tokens of each sequence, in place of what is not verified.

        Returns where all KV lies, also what is on the host, with a row for each new token; and a copy that
        must be done before the step is.
        """
        repeated = [key for key, count in zip(sequences, rows, strict=True) for _ in range(count)]
        grown = []
        for sequence, count in zip(sequences, rows, strict=True):
            entry = self._sequences[sequence]
            grown.append(self._grow(sequence, self._tables.lengths(sequence) - entry.unverified, count))
            entry.unverified, entry.verifying = count, True
        spilled, copy = self.host.attend(repeated, self.layers)
        return self._paged(repeated, np.concatenate(grown, axis=1), rows, spilled), copy

    def suspend(self, sequence: int) -> None:
        """Moves all that ``sequence`` holds on the device to the host, which must have room for it.

        Raises IntegrityError, changing nothing, if it has not.
        """
        self._note_peak(sequence)
        entry = self._sequences[sequence]
        entry.positions = [self.positions(sequence, layer) for layer in range(self.layers)]
        key = _suspended(sequence)
        self.host.open(key, fixed=True)
        for layer, positions in enumerate(entry.positions):
            # A copy, so that the pages may be used again while it is on its way.
            held, positions = self.read(sequence, layer), positions
            if sequence in self._keys:
                index = self._keys.read(sequence, layer)
                held = torch.cat((held, index))
                positions = np.concatenate((positions, np.zeros(len(index), dtype=np.int32)))
            self.host.spill(key, layer, [positions], held)
            if len(self.host.positions(key, layer)) < len(positions):
                self.host.close(key)
                raise IntegrityError(f"the host has no room for suspended sequence {sequence}")
        self._suspended[sequence] = self._scores.read(sequence).cpu()
        self._close(sequence)

    def resume(self, sequence: int) -> None:
        """Moves all of a suspended sequence back to the device, bit for bit.

        Raises OutOfPagesError when there is no room for it; call it only when there is.
        """
        key, entry = _suspended(sequence), self._sequences[sequence]
        self._scores.open(sequence, entry.plan)
        self._scores.write(sequence, to_device(self._suspended.pop(sequence), self.pool.rows.device))
        self._tables.open(sequence)
        if entry.plan.indexes:
            self._keys.open(sequence)
        lengths = np.array([len(positions) for positions in entry.positions])
        self._tables.resize_layers(sequence, 0, lengths)
        for layer, length in enumerate(lengths.tolist()):
            kv = self.host.read(key, layer)
            assert kv is not None  # it is fixed
            self.pool.write(self._rows(sequence, layer, 0, length), kv[:length])
            if entry.plan.indexes:
                self._keys.write(sequence, layer, kv[length:])
        self.host.close(key)

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
            score_pages=score_pages(entry.plan, self._layout),
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
        if self._suspended.pop(sequence, None) is not None:
            self.host.close(_suspended(sequence))
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
        self._keys.tables.check_integrity()
        self.host.check_integrity()
        active = self._sequences.keys() - self._suspended.keys()
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
        self._scores.close(sequence)
        self._tables.close(sequence)
        if sequence in self._keys:
            self._keys.close(sequence)

    def _pages(self, sequence: int) -> int:
        return self._tables.pages_of(sequence) + self._scores.pages(sequence) + self._keys.pages(sequence)

    def _spill(self, sequence: int, first: int, positions: Sequence[Positions], kv: torch.Tensor) -> None:
        """Spills as ``HostStore.spill`` does, and indexes the keys."""
        before = [self.host.count(sequence, first + number) for number in range(len(positions))]
        self.host.spill(sequence, first, positions, kv)
        if sequence in self._keys:
            end = 0
            for layer, (own, count) in enumerate(zip(positions, before, strict=True), first):
                start, end = end, end + len(own)
                self._keys.append(sequence, layer, kv[start:end, 0], count)

    def _grow(self, sequence: int, before: Lengths, count: int) -> Rows:
        """Makes every layer hold ``count`` tokens more than ``before``: their rows, [layers, count]."""
        self._tables.resize_layers(sequence, 0, before + count)
        rows: Rows = self._tables.rows_of_layers(sequence, 0, before, before + count)
        return rows.reshape(self.layers, count)

    def _paged(
        self,
        sequences: Sequence[int],
        slots: Rows,
        counts: Sequence[int] = (),
        spilled: PagedLayers | None = None,
    ) -> PagedStep:
        """A step with a row for each of ``sequences``, ``counts`` of each in a row; one unless given."""
        pages, lengths = self._tables.batch(sequences)
        if counts:  # a token does not attend to those behind it
            lengths -= np.concatenate([np.arange(count)[::-1] for count in counts]).astype(np.int32)
        return PagedStep(
            self.pool.rows,
            self._on_device(slots),
            self._on_device(pages),
            self._on_device(lengths),
            spilled,
        )

    def _count(self, sequence: int, verified: int) -> None:
        """Counts unverified tokens as generated, and compresses chunks that are due by that."""
        entry = self._sequences[sequence]
        before = entry.generated
        entry.generated += verified
        entry.unverified -= verified
        generation = entry.plan.generation
        if generation is None:
            return
        # No two chunks, as there are fewer drafts than that.
        if generation.chunks(entry.generated) > generation.chunks(before):
            self._note_peak(sequence)
            self._compress_chunk(sequence, generation)

    def _compress_chunk(self, sequence: int, generation: GenerationPlan) -> None:
        """Cuts a chunk of generated tokens down to what the plan keeps in each layer, and spills the rest.

        All layers at once: the chunk and the tokens behind it are as many in each.
        """
        entry = self._sequences[sequence]
        own = slice(self._layout.first, self._layout.end)
        done = generation.chunks(entry.generated) - 1
        keeps = np.array(generation.keeps[own])
        starts = np.array(generation.start[own]) + done * keeps
        ends = self._tables.lengths(sequence)
        positions = [self.positions(sequence, layer) for layer in range(self.layers)]
        rows = self._tables.rows_of_layers(sequence, 0, starts, ends).reshape(self.layers, -1)
        tokens = self.pool.read(self._on_device(rows))
        stays = np.ones(rows.shape, dtype=bool)
        stays[:, : generation.chunk] = False
        if generation.scores:
            scores = self._scores.take_chunk(sequence, generation.chunk)
            stays[:, : generation.chunk] = best_of_chunk(scores, self._on_device(keeps)).cpu().numpy()
        gone = [own[start:][~stay] for own, start, stay in zip(positions, starts, stays, strict=True)]
        lengths = stays.sum(axis=1)
        places = rows[np.arange(rows.shape[1]) < lengths[:, None]]
        self.pool.write(self._on_device(places), tokens[self._on_device(stays)])
        self._tables.resize_layers(sequence, 0, starts + lengths)
        entry.positions = [
            np.concatenate((own[:start], own[start:][stay]))
            for own, start, stay in zip(positions, starts, stays, strict=True)
        ]
        self._spill(sequence, 0, gone, tokens[self._on_device(~stays)])

    def _layer_receipt(self, sequence: int, layer: int) -> LayerReceipt:
        entry = self._sequences[sequence]
        positions = self.positions(sequence, layer)
        prompt = int((positions < entry.plan.prompt_tokens).sum())
        spilled = len(self.host.positions(sequence, layer))
        return LayerReceipt(
            layer=self._layout.first + layer,
            prompt_kept=prompt,
            generated_kept=len(positions) - prompt,
            spilled=spilled,
            dropped=entry.plan.prompt_tokens + entry.generated - len(positions) - spilled,
            recalled=entry.recalled[layer],
        )

    def _note_peak(self, sequence: int) -> None:
        """Pages only grow between compressions, so noting them there and at the end finds the peak."""
        entry = self._sequences[sequence]
        entry.peak_pages = max(entry.peak_pages, self._pages(sequence))

    def _rows(self, sequence: int, layer: int, start: int, end: int) -> torch.Tensor:
        return self._on_device(self._tables.rows(sequence, layer, start, end))

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self.pool.rows.device)


def _suspended(sequence: int) -> tuple[str, int]:
    """The host store's name for the KV that a suspended sequence had on the device."""
    return "suspended", sequence
