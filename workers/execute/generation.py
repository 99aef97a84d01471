"""The generation stage: what of a sequence's own output is scored and stays, as it grows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.footprint import ShardLayout, score_width
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.device import to_device
from workers.kv.cache import ShardCache
from workers.kv.entry import CacheNeeds
from workers.policies.select import best_of_chunk


@dataclass(frozen=True)
class ScoreTargets:
    """Where one decode step's attention is accumulated, for all scored tokens of a micro-batch.

    Attributes:
        tail: newest tokens of each cache whose attention is wanted.
        rows: row of the micro-batch, int64 [n].
        columns: place among the newest ``tail`` tokens of its cache, int64 [n].
        weights: what the attention is multiplied with, fp32 [n].
        scores: place among the pool's floats, int64 [layers, n].
    """

    tail: int
    rows: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor


@dataclass
class _Growing:
    """A sequence's plan, and its generated tokens that are verified; the rest of its newest are not.

    ``verifying``: those have been fed to be verified, and are no drafts. ``attention`` is what drafts pay
    to scored tokens: places and values.
    """

    plan: KeepPlan
    generated: int = 0
    unverified: int = 0
    verifying: bool = False
    attention: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

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
    weight ``distance_weight``, the oldest with 1, as the prompt's window is (arXiv 2405.12532, 3.3).
    """

    def __init__(self, cache: ShardCache, layout: ShardLayout) -> None:
        self._cache, self._layout = cache, layout
        self._sequences: dict[int, _Growing] = {}

    def open(self, sequence: int, plan: KeepPlan) -> None:
        """Begins a sequence, as ``ShardCache.open`` does."""
        self._cache.open(sequence, cache_needs(plan))
        self._sequences[sequence] = _Growing(plan)

    def reopen(self, old: int, sequence: int, plan: KeepPlan, reused: int) -> None:
        """Goes on with the first ``reused`` tokens of ``old``, as ``ShardCache.reopen`` does."""
        self._cache.reopen(old, sequence, cache_needs(plan), reused)
        del self._sequences[old]
        self._sequences[sequence] = _Growing(plan)

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

    def unverified(self, sequence: int) -> int:
        """Its newest tokens that are not verified."""
        return self._sequences[sequence].unverified

    def targets(self, sequences: Sequence[int]) -> ScoreTargets | None:
        """Where the attention of a step's new tokens is to be accumulated, once they are fed.

        None if no sequence has a complete chunk behind its new token. One may be there several times in a
        row, with as many tokens.
        """
        rows, back, weights, places = [], [], [], []
        fed: Counter[int] = Counter()
        for row, sequence in enumerate(sequences):
            fed[sequence] += 1
            growing = self._sequences[sequence]
            plan, generation = growing.plan, growing.plan.generation
            if generation is None or not generation.scores:
                continue
            tokens = growing.uncompressed + growing.unverified + fed[sequence]
            complete = (tokens - 1) // generation.chunk * generation.chunk
            behind = min(complete, score_width(plan))  # drafts may go beyond what is scored
            if behind:
                rows.append(np.full(behind, row))
                back.append(tokens - np.arange(behind))
                weights.append(_weights(plan, generation, tokens, complete)[:behind])
                places.append(self._cache.device.scores.places(sequence)[:, :behind])
        if not rows:
            return None
        tail = max(int(slots[0]) for slots in back)
        return ScoreTargets(
            tail=tail,
            rows=self._on_device(np.concatenate(rows)),
            columns=self._on_device(tail - np.concatenate(back)),
            weights=self._on_device(np.concatenate(weights)),
            scores=self._on_device(np.concatenate(places, axis=1)),
        )

    def add_scores(self, sequences: Sequence[int], targets: ScoreTargets, shares: torch.Tensor) -> None:
        """Accumulates attention to the newest tokens, fp32 [layers, sequences, targets.tail].

        That of a draft counts once it is verified.
        """
        attention = shares[:, targets.rows, targets.columns] * targets.weights
        drafting = [row for row, key in enumerate(sequences) if self._sequences[key].plan.drafts]
        for row in drafting:
            scored = targets.rows == row
            paid = (targets.scores[:, scored], attention[:, scored])
            self._sequences[sequences[row]].attention.append(paid)
        if drafting:
            others = ~torch.isin(targets.rows, self._on_device(np.array(drafting)))
            self._cache.device.scores.add(targets.scores[:, others], attention[:, others])
        else:
            self._cache.device.scores.add(targets.scores, attention)

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
        for places, attention in growing.attention[:verified]:
            self._cache.device.scores.add(places, attention)
        growing.attention.clear()
        self._count(sequence, verified)

    def _count(self, sequence: int, verified: int) -> None:
        """Counts unverified tokens as generated, and compresses chunks that are due by that."""
        growing = self._sequences[sequence]
        before = growing.generated
        growing.generated += verified
        growing.unverified -= verified
        generation = growing.plan.generation
        # No two chunks, as there are fewer drafts than that.
        if generation is not None and generation.chunks(growing.generated) > generation.chunks(before):
            self._compress_chunk(sequence, generation)

    def _compress_chunk(self, sequence: int, generation: GenerationPlan) -> None:
        """Cuts a chunk of generated tokens down to what the plan keeps in each layer.

        All layers at once: the chunk and the tokens behind it are as many in each.
        """
        layers = slice(self._layout.first, self._layout.end)
        keeps = np.array(generation.keeps[layers])
        done = generation.chunks(self._sequences[sequence].generated) - 1
        stays = np.zeros((len(keeps), generation.chunk), dtype=bool)
        if generation.scores:
            scores = self._cache.device.scores.take(sequence, generation.chunk)
            stays = best_of_chunk(scores, self._on_device(keeps)).cpu().numpy()
        self._cache.cut(sequence, np.array(generation.start[layers]) + done * keeps, stays)

    def _on_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._cache.device.pool.rows.device)


def cache_needs(plan: KeepPlan) -> CacheNeeds:
    """What ``plan`` asks of a cache."""
    return CacheNeeds(
        prompt_tokens=plan.prompt_tokens,
        score_width=score_width(plan),
        whole=plan.spills_all,
        indexed=plan.indexes,
        hidden=plan.spills_hidden,
    )


def _weights(
    plan: KeepPlan, generation: GenerationPlan, tokens: int, behind: int
) -> npt.NDArray[np.float32]:
    """The new token's weight for each of the ``behind`` tokens in complete chunks."""
    age = tokens - 1 - np.arange(generation.chunk, behind + 1, generation.chunk)
    slope = (plan.distance_weight - 1) / max(1, generation.window - 1)
    return np.repeat(1 + slope * age, generation.chunk).astype(np.float32)
