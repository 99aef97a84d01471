"""The generation stage: what of a sequence's own output is scored and stays, as it grows."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import ShardLayout, score_rows
from workers.budget.plan import KeepPlan
from workers.device import to_device
from workers.execute.choice import Chooser
from workers.execute.compressor import Compressor
from workers.execute.growing import Growing
from workers.execute.scores import (
    CacheScores,
    ChunkCollector,
    ScoreTargets,
    looks,
    window_weights,
)
from workers.kv.cache import ShardCache
from workers.kv.entry import CacheNeeds
from workers.policies.gates import Gate


class Generation:
    """Scores and compresses the generated tokens of all sequences of a shard.

    A chunk is scored by the recent window alone: by the ``window`` tokens behind it, the newest with
    weight ``newest``, the oldest with 1, as the prompt's window is (arXiv 2405.12532, 3.3). Where all
    tokens are chosen among, all are scored.
    """

    def __init__(self, cache: ShardCache, layout: ShardLayout, gates: Sequence[Gate | None]) -> None:
        """``gates``: of each layer of the shard."""
        self._cache, self._layout = cache, layout
        self._compressor = Compressor(cache, layout, gates)
        self._sequences: dict[int, Growing] = {}

    def open(self, sequence: int, plan: KeepPlan, choose: Chooser, length: int = 0) -> None:
        """Begins a sequence of at most ``length`` tokens, as ``ShardCache.open`` does."""
        self._cache.open(sequence, cache_needs(plan, self._layout, length))
        self._sequences[sequence] = Growing(plan, choose, plan.score_base)

    def reopen(
        self, old: int, sequence: int, plan: KeepPlan, reused: int, choose: Chooser, length: int = 0
    ) -> None:
        """Goes on with the first ``reused`` tokens of ``old``, as ``ShardCache.reopen`` does."""
        self._cache.reopen(old, sequence, cache_needs(plan, self._layout, length), reused)
        del self._sequences[old]
        self._sequences[sequence] = Growing(plan, choose, plan.score_base)

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
                    low = generation.accumulates.over_rows == "low"
                    seen = (tokens - growing.lacking(self._layout.first, self._layout.end)).astype(
                        np.float32
                    )
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
            self._compressor.rechoose(sequence, growing, generation, due * generation.chunk)
        elif due:  # no two, as there are fewer drafts than that
            self._compressor.compress_chunk(sequence, growing, generation)

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._cache.device.pool.rows.device)


def cache_needs(plan: KeepPlan, layout: ShardLayout, length: int = 0) -> CacheNeeds:
    """What ``plan`` asks of the cache of a shard, for a sequence of at most ``length`` tokens."""
    return CacheNeeds(
        prompt_tokens=plan.prompt_tokens,
        score_width=plan.score_width,
        score_rows=score_rows(plan, layout.kv_heads),
        sets=plan.sets(layout.kv_heads),
        whole=plan.spills_all,
        mirrored=plan.drafts > 0 and layout.mirrors,
        indexed=plan.indexes,
        hidden=plan.spills_hidden,
        sinks=plan.moved_sinks,
        length=length,
    )
