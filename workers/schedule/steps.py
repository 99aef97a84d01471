"""Makes the steps of a pipeline, and knows which are under way. Pure."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from workers.schedule.sequence import RunningSequence
from workers.schedule.step import SequenceSpec, Step, StepKind

# A step, and the token ids of its rows.
Work = tuple[Step, npt.NDArray[np.int64]]
NO_TOKENS = np.zeros(0, dtype=np.int64)


class Steps:
    """Numbers steps, from what is known of their sequences when they are made."""

    def __init__(self, sequences: Mapping[int, RunningSequence], context: int) -> None:
        """
        Args:
            sequences: all that are admitted, now and later; other keys are parked sessions'.
            context: tokens that a prefill attends to, at most.
        """
        self._sequences, self._context = sequences, context
        self._under_way: dict[int, Step] = {}
        self._made = 0

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._under_way)

    def __iter__(self) -> Iterator[Step]:
        """Those that are under way, as they were sent."""
        return iter(self._under_way.values())

    def kinds(self) -> Counter[StepKind]:
        """How many of each kind are under way."""
        return Counter(step.kind for step in self)

    def done(self, step: Step) -> None:
        """Takes note that ``step`` has passed all shards."""
        del self._under_way[step.number]

    def without_rows(self, kind: StepKind, keys: Sequence[int]) -> Work:
        """Moves, parks or releases sequences."""
        return self._make(kind, keys), NO_TOKENS

    def prefill(self, specs: Sequence[SequenceSpec], slice_steps: float) -> Work:
        """Begins sequences, or goes on with parked ones, whose reused tokens are not fed again."""
        keys = [spec.sequence for spec in specs]
        requests = [self._sequences[key].request for key in keys]
        positions = [self._read(spec) for spec in specs]
        ids = [np.array(each.prompt_ids)[own] for each, own in zip(requests, positions, strict=True)]
        rows = tuple(map(len, ids))
        step = self._make(StepKind.PREFILL, keys, rows, positions, tuple(specs), slice_steps)
        return step, np.concatenate(ids)

    def decode(self, keys: Sequence[int], counts: Sequence[int]) -> Work:
        """Feeds ``counts`` tokens of each sequence, known ones behind the newest; or all to be verified."""
        sequences = [self._sequences[key] for key in keys]
        kind = StepKind.VERIFY if sequences[0].verifies else StepKind.DECODE
        fed = [[each.output_ids[each.fed], *each.ahead_ids] for each in sequences]
        first = [len(each.request.prompt_ids) + each.fed for each in sequences]
        if kind is StepKind.DECODE:
            first = [start + len(ids) - 1 for start, ids in zip(first, fed, strict=True)]
            ahead = [each.known_ahead(count - 1) for each, count in zip(sequences, counts, strict=True)]
            fed = [[ids[-1], *known] for ids, known in zip(fed, ahead, strict=True)]
        rows = tuple(map(len, fed))
        positions = [start + np.arange(count) for start, count in zip(first, rows, strict=True)]
        return self._make(kind, keys, rows, positions), np.array(list(itertools.chain(*fed)))

    def _read(self, spec: SequenceSpec) -> npt.NDArray[np.int64]:
        """Positions of the prompt's tokens that are fed: of one that outgrows the context its two ends."""
        positions = np.arange(spec.reused, spec.prompt_tokens)
        if len(positions) > self._context:
            sinks = self._sequences[spec.sequence].plan.moved_sinks
            positions = np.concatenate((positions[:sinks], positions[sinks - self._context :]))
        return positions

    def _make(
        self,
        kind: StepKind,
        keys: Sequence[int],
        rows: tuple[int, ...] = (),
        positions: Sequence[npt.NDArray[np.int64]] = (),
        new: tuple[SequenceSpec, ...] = (),
        slice_steps: float = 0.0,
    ) -> Step:
        self._made += 1
        sequences = [self._sequences.get(key) for key in keys]
        drawn = [_drawn(kind, each, rows[row] if rows else 0) for row, each in enumerate(sequences)]
        step = Step(
            number=self._made,
            kind=kind,
            sequences=tuple(keys),
            rows=rows,
            positions=np.concatenate([np.zeros(0), *positions]).astype(np.int32),
            draws=tuple(map(len, drawn)),
            output_indices=tuple(itertools.chain(*drawn)),
            forced=tuple(
                -1 if each is None else each.forced(index)
                for each, indices in zip(sequences, drawn, strict=True)
                for index in indices
            ),
            generated=tuple(0 if each is None else max(0, each.fed) for each in sequences),
            lengths=tuple(0 if each is None else each.length for each in sequences),
            new=new,
            slice_steps=slice_steps,
        )
        self._under_way[step.number] = step
        return step


def spec_of(sequence: RunningSequence) -> SequenceSpec:
    """What shards must know to begin ``sequence``."""
    request, sampling = sequence.request, sequence.request.sampling
    repeats = sampling.repetition_penalty != 1
    looks = repeats or sampling.presence_penalty or sampling.frequency_penalty or request.constraint
    return SequenceSpec(
        sequence=request.sequence,
        prompt_tokens=len(request.prompt_ids),
        compression=request.compression,
        sampling=sampling,
        trace=request.trace,
        prompt_ids=request.prompt_ids if repeats else (),
        output_ids=tuple(sequence.known_ids) if looks else (),
        banned=sequence.banned,
        min_tokens=request.stopping.min_tokens,
        constraint=request.constraint,
        instructions=request.instructions,
    )


def _drawn(kind: StepKind, sequence: RunningSequence | None, rows: int) -> range:
    """The outputs that a step draws of ``sequence``: one behind all that is fed, or of each row."""
    if sequence is None:
        return range(1)
    if kind is StepKind.VERIFY or (
        kind is StepKind.DECODE and sequence.draws_all and not sequence.drafting
    ):
        return range(sequence.reached, sequence.reached + rows)
    first = sequence.reached + len(sequence.drafts) + (rows - 1 if kind is StepKind.DECODE else 0)
    return range(first, first + 1)
