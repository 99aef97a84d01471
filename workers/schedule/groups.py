"""Who goes through the shards together. Pure."""

import itertools
from collections.abc import Sequence

from workers.budget.kv_format import MOST_FED
from workers.schedule.memory import PipelineLayout, PipelineMemory
from workers.schedule.parked import ParkedSessions
from workers.schedule.roster import Roster
from workers.schedule.step import VERIFIED_ROWS


class Groups:
    """Chooses the sequences of the next prefill, decode or verification, and those of a cohort."""

    def __init__(
        self, layout: PipelineLayout, memory: PipelineMemory, parked: ParkedSessions, roster: Roster
    ) -> None:
        self._layout, self._memory, self._parked, self._roster = layout, memory, parked, roster

    def form_cohort(self) -> None:
        """Makes those a cohort that wait now, or lets them join it, as far as ``cohort_prefills`` go."""
        cohorts, sequences = self._roster.cohorts, self._roster.sequences
        members = [key for key in cohorts.open if key in sequences]
        room = self._layout.tuning.cohort_prefills * self._layout.max_prefill_tokens
        room -= sum(map(self._prompt_tokens, members))
        joining: list[int] = []
        for key in self._roster.waiting:
            if key in cohorts:
                continue
            room -= self._prompt_tokens(key)
            if room < 0 and (joining or members):
                break
            joining.append(key)
        cohorts.form(joining)

    def prefill(self) -> list[int]:
        """Those whose prompts are prefilled next, in order, which hold their pages; none without room."""
        keys: list[int] = []
        tokens = 0
        # Smaller ones with more shards, so that all of these have something to do soon.
        limit = self._layout.max_prefill_tokens // len(self._layout.shards)
        for key in self._roster.waiting:
            tokens += self._prompt_tokens(key)
            if keys and (tokens > limit or not self._share_prefill(keys[0], key)):
                break
            if not self._memory.hold([key], [0]):
                break
            keys.append(key)
        return keys

    def _share_prefill(self, first: int, key: int) -> bool:
        """Whether ``key`` is of the same cohort as ``first``, and has no parked session to go on with."""
        session = self._parked.get(self._roster.sequences[key].session_id)
        return session is None and self._roster.cohorts.same(first, key)

    def decode(self) -> list[int]:
        """Those that decode, or verify, next: of all that do, an equal part for each shard."""
        sequences, ready = self._roster.sequences, self._roster.ready
        decoding = sum(sequence.reached > 0 for sequence in sequences.values())
        decoding -= len(self._memory.suspended)
        size = -(-decoding // len(self._layout.shards))
        if not sequences[next(iter(ready))].verifies:
            return [key for key in ready if not sequences[key].verifies][:size]
        # All that have drafts, so that they stay in step: one verification costs little more for many.
        keys = [key for key in ready if sequences[key].verifies or sequences[key].drafts]
        rows = itertools.accumulate(1 + len(sequences[key].ahead_ids) for key in keys[:size])
        return [key for key, total in zip(keys, rows, strict=False) if total <= VERIFIED_ROWS]

    def counts(self, keys: Sequence[int]) -> list[int]:
        """Tokens that a decode step feeds of each: the newest, and what is known behind it."""
        counts, room = [], max(0, VERIFIED_ROWS - len(keys))
        shard = self._layout.shards[0]
        most = MOST_FED - 1 if shard.kv_format.recent or shard.mirrors else VERIFIED_ROWS
        for key in keys:
            ahead = len(self._roster.sequences[key].known_ahead(min(room, most)))
            counts.append(1 + ahead)
            room -= ahead
        return counts

    def _prompt_tokens(self, key: int) -> int:
        return len(self._roster.sequences[key].request.prompt_ids)
