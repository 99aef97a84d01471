"""The generation stage: what of a sequence's own output is scored and stays, as it grows."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from workers.budget.footprint import ShardLayout, score_rows
from workers.budget.observation import KeysValues
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.device import to_device
from workers.execute.choice import Chooser, Indices
from workers.execute.scores import (
    CacheScores,
    ChunkCollector,
    ScoreTargets,
    looks,
    runs,
    window_weights,
)
from workers.kv.cache import ShardCache
from workers.kv.entry import CacheNeeds
from workers.kv.page_table import Lengths
from workers.policies.observed import Observed


@dataclass(frozen=True)
class Bounds:
    """Tokens that stay in any case, the first and the newest."""

    sinks: int
    recent: int


@dataclass
class _Growing:
    """A sequence's plan, and its generated tokens that are verified; the rest of its newest are not.

    ``choose`` is its policy's; ``base``: columns of scores before those of generated tokens. ``verifying``:
    those have been fed to be verified, and are no drafts. ``unpaid`` adds what each draft pays.
    """

    plan: KeepPlan
    choose: Chooser
    base: int
    generated: int = 0
    unverified: int = 0
    verifying: bool = False
    unpaid: list[Callable[[], None]] = field(default_factory=list)

    @property
    def uncompressed(self) -> int:
        """Generated tokens that compression has not passed over."""
        generation = self.plan.generation
        if generation is None:
            return self.generated
        return self.generated - generation.chunks(self.generated) * generation.chunk


class Generation:
    """Scores and compresses the generated tokens of all sequences of a shard.

    A chunk is scored by the recent window alone: by the ``window`` tokens behind it, the newest with
    weight ``newest``, the oldest with 1, as the prompt's window is (arXiv 2405.12532, 3.3). Where all
    tokens are chosen among, all are scored.
    """

    def __init__(self, cache: ShardCache, layout: ShardLayout) -> None:
        self._cache, self._layout = cache, layout
        self._sequences: dict[int, _Growing] = {}

    def open(self, sequence: int, plan: KeepPlan, choose: Chooser) -> None:
        """Begins a sequence, as ``ShardCache.open`` does."""
        self._cache.open(sequence, cache_needs(plan, self._layout.kv_heads))
        self._sequences[sequence] = _Growing(plan, choose, plan.score_base)

    def reopen(self, old: int, sequence: int, plan: KeepPlan, reused: int, choose: Chooser) -> None:
        """Goes on with the first ``reused`` tokens of ``old``, as ``ShardCache.reopen`` does."""
        self._cache.reopen(old, sequence, cache_needs(plan, self._layout.kv_heads), reused)
        del self._sequences[old]
        self._sequences[sequence] = _Growing(plan, choose, plan.score_base)

    def close(self, sequence: int) -> None:
        """Forgets a sequence, which the cache releases."""
        del self._sequences[sequence]

    def plan(self, sequence: int) -> KeepPlan:
        """The plan of an open sequence, as it has turned out."""
        return self._sequences[sequence].plan

    def keep(self, sequence: int, layer: int, kept: int) -> None:
        """Notes that ``layer`` of the shard has turned out to keep ``kept`` tokens of the prompt."""
        growing = self._sequences[sequence]
        growing.plan = growing.plan.keeping(self._layout.first + layer, kept)

    def failure(self, sequence: int) -> str:
        """What its policy did wrong; "" if nothing."""
        return self._sequences[sequence].choose.failure

    def unverified(self, sequence: int) -> int:
        """Its newest tokens that are not verified."""
        return self._sequences[sequence].unverified

    def targets(self, sequences: Sequence[int]) -> ScoreTargets | None:
        """Where the attention of a step's new tokens is to be accumulated, once they are fed.

        None if none is wanted. A sequence may be there several times in a row, with as many tokens.
        """
        fed: Counter[int] = Counter()
        chunks, caches = {True: ChunkCollector(), False: ChunkCollector()}, []
        for row, sequence in enumerate(sequences):
            fed[sequence] += 1
            growing = self._sequences[sequence]
            plan, generation = growing.plan, growing.plan.generation
            if generation is None or generation.accumulates is None:
                continue
            tokens = growing.base + growing.uncompressed + growing.unverified + fed[sequence]
            if generation.rechooses:
                if looks(generation, growing.generated + growing.unverified + fed[sequence]):
                    low = generation.accumulates.counts_low
                    seen = (tokens - self._lacking(growing)).astype(np.float32)
                    even = self._on_device(1 / seen[:, None, None]) if low else None
                    decay = generation.accumulates.decay
                    each = plan.accumulates_each
                    caches.append(CacheScores(each, row, sequence, tokens, decay, even))
                continue
            complete = (tokens - 1) // generation.chunk * generation.chunk
            behind = min(complete, plan.score_width)  # drafts may go beyond what is scored
            if behind:
                collector = chunks[plan.accumulates_each]
                collector.rows.append(row)
                collector.back.append(tokens - np.arange(behind))
                collector.weights.append(window_weights(generation, tokens, complete)[:behind])
                collector.places.append(self._cache.device.scores.places(sequence)[..., :behind])
        tails = [int(back[0]) for collector in chunks.values() for back in collector.back]
        tail = max([*tails, *(cache.tokens for cache in caches)], default=0)
        device = self._cache.device.pool.rows.device
        groups = [own.scores(each, tail, device) for each, own in chunks.items() if own.rows]
        return ScoreTargets(tail, tuple(groups), tuple(caches)) if tail else None

    def add_scores(self, sequences: Sequence[int], targets: ScoreTargets, shares: torch.Tensor) -> None:
        """Accumulates attention to the newest tokens, fp32 [layers, sequences, KV heads, targets.tail].

        That of a draft counts once it is verified.
        """
        scores = self._cache.device.scores
        drafting = [row for row, key in enumerate(sequences) if self._sequences[key].plan.drafts]
        for group in targets.chunks:
            paid, counts = group.paid(shares), ~np.isin(group.rows, drafting)
            for row in drafting:
                own = self._on_device(np.flatnonzero(group.rows == row))
                add = partial(scores.add, group.places[:, own], paid[:, own])
                self._sequences[sequences[row]].unpaid.append(add)
            now = slice(None) if counts.all() else self._on_device(np.flatnonzero(counts))
            scores.add(group.places[:, now], paid[:, now])
        for cache in targets.caches:
            growing = self._sequences[cache.sequence]
            add = partial(scores.add_to_all, cache.sequence, cache.paid(shares), cache.decay)
            growing.unpaid.append(add) if growing.plan.drafts else add()

    def fed(self, sequences: Sequence[int]) -> None:
        """Counts the token that was appended to every layer, and compresses chunks that are due."""
        for sequence in sequences:
            growing = self._sequences[sequence]
            growing.unverified += 1
            if not growing.plan.drafts:
                self._count(sequence, 1)

    def fed_to_verify(self, sequence: int, tokens: int) -> None:
        """Notes that so many tokens are fed to be verified, in place of all that were not."""
        growing = self._sequences[sequence]
        growing.unverified, growing.verifying = tokens, True

    def settle(self, sequence: int, generated: int, drafts: bool) -> None:
        """Ends a verification: of what it fed, so many tokens stay that there are ``generated`` in all.

        ``drafts``: such as have come since stay too.
        """
        growing = self._sequences[sequence]
        if not growing.verifying and (drafts or not growing.unverified):
            return
        verified = generated - growing.generated
        self._cache.take_back(sequence, growing.unverified - verified)
        growing.unverified, growing.verifying = verified, False
        for add in growing.unpaid[:verified]:
            add()
        growing.unpaid.clear()
        self._count(sequence, verified)

    def _count(self, sequence: int, verified: int) -> None:
        """Counts unverified tokens as generated, and compresses chunks that are due by that."""
        growing = self._sequences[sequence]
        before = growing.generated
        growing.generated += verified
        growing.unverified -= verified
        generation = growing.plan.generation
        if generation is None:
            return
        due = generation.chunks(growing.generated) - generation.chunks(before)
        if due and generation.rechooses:
            self._rechoose(sequence, generation, due * generation.chunk)
        elif due:  # no two, as there are fewer drafts than that
            self._compress_chunk(sequence, generation)

    def _compress_chunk(self, sequence: int, generation: GenerationPlan) -> None:
        """Cuts a chunk of generated tokens down to what the plan keeps in each layer.

        All layers at once: the chunk and the tokens behind it are as many in each.
        """
        growing, layers = self._sequences[sequence], slice(self._layout.first, self._layout.end)
        keeps, chunk = np.array(generation.keeps[layers]), generation.chunk
        done = generation.chunks(growing.generated) - 1
        # A few numbers, which the host chooses among without waiting for each layer's choice.
        scores = self._cache.device.scores.take(sequence, chunk).cpu() if generation.accumulates else None
        stays = np.zeros((len(keeps), growing.plan.sets(self._layout.kv_heads), chunk), dtype=bool)
        for keep in set(keeps.tolist()) - {0}:
            alike = np.flatnonzero(keeps == keep)
            own = None if scores is None else scores[torch.from_numpy(alike)]
            chosen = self._chosen(growing, Bounds(0, 0), own, None, chunk, keep, len(alike))
            stays[alike] = _among(chosen, chunk)
        starts = np.array(generation.start[layers]) + done * keeps
        self._cache.cut(sequence, 0, starts, stays)

    def _rechoose(self, sequence: int, generation: GenerationPlan, drop: int) -> None:
        """Drops so many of all tokens of each layer."""
        growing, cache = self._sequences[sequence], self._cache
        lengths = [cache.device.length(sequence, layer) for layer in range(cache.layers)]
        bounds = Bounds(generation.sinks, generation.recent)
        scores = cache.device.scores.read(sequence) if generation.accumulates else None
        lacking = self._lacking(growing)
        wants_kv = isinstance(generation.observes, KeysValues)
        for alike in runs(range(cache.layers) if wants_kv else lengths):
            tokens, first, count = lengths[alike.start], int(lacking[alike.start]), alike.stop - alike.start
            own = None if scores is None else scores[alike, :, first : first + tokens]
            kv = cache.device.read(sequence, alike.start) if wants_kv else None
            chosen = self._chosen(growing, bounds, own, kv, tokens, tokens - drop, count)
            if scores is not None and own is not None:
                left = own.gather(2, self._on_device(chosen).expand(-1, own.shape[1], -1))
                scores[alike, :, first : first + tokens] = pad(left, (0, drop))
            cache.cut(sequence, alike.start, np.zeros(count, dtype=np.int64), _among(chosen, tokens))
        if scores is not None:
            forgets = generation.accumulates is not None and generation.accumulates.rows is not None
            cache.device.scores.write(sequence, torch.zeros_like(scores) if forgets else scores)

    def _chosen(
        self,
        growing: _Growing,
        bounds: Bounds,
        attention: torch.Tensor | None,
        kv: torch.Tensor | None,
        tokens: int,
        keep: int,
        layers: int,
    ) -> Indices:
        """Which of ``tokens`` tokens stay in ``layers`` layers, int64 [layers, sets, keep]."""
        plan = growing.plan
        device = self._cache.device.pool.rows.device if attention is None else attention.device
        if attention is not None and plan.heads == "max":
            attention = attention.amax(dim=1, keepdim=True)
        seen = Observed(bounds.sinks, bounds.recent, plan.heads, device, attention, kv)
        return growing.choose(seen, (layers, plan.sets(self._layout.kv_heads)), tokens, keep)

    def _lacking(self, growing: _Growing) -> Lengths:
        """Tokens that each layer of the shard has less than the one that was to have most of the prompt."""
        kept = np.array(growing.plan.kept[self._layout.first : self._layout.end])
        return growing.base - kept if growing.base else np.zeros_like(kept)

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._cache.device.pool.rows.device)


def cache_needs(plan: KeepPlan, kv_heads: int) -> CacheNeeds:
    """What ``plan`` asks of a cache of so many KV heads."""
    return CacheNeeds(
        prompt_tokens=plan.prompt_tokens,
        score_width=plan.score_width,
        score_rows=score_rows(plan, kv_heads),
        sets=plan.sets(kv_heads),
        whole=plan.spills_all,
        indexed=plan.indexes,
        hidden=plan.spills_hidden,
    )


def _among(chosen: Indices, tokens: int) -> npt.NDArray[np.bool_]:
    """Which of ``tokens`` tokens are ``chosen`` [layers, sets, kept], bool [layers, sets, tokens]."""
    found = np.zeros((*chosen.shape[:2], tokens), dtype=bool)
    np.put_along_axis(found, chosen, True, axis=2)
    return found
