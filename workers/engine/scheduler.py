"""Decides what a pipeline does next. Pure: no tensors, no time, no threads."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.compression.policies import plan
from workers.engine.cohorts import Cohorts
from workers.engine.sequence import RunningSequence, SequenceRequest
from workers.engine.step import SequenceSpec, Step, StepKind
from workers.kv.footprint import ShardLayout, peak_pages
from workers.kv.ledger import Ledger


@dataclass(frozen=True)
class PipelineLayout:
    """A pipeline's shards in order of rank, and its bounds.

    Attributes:
        shards: layers and page size of each.
        pages: size of each shard's pool, in pages.
        layers: layers of the whole model.
        max_sequences: sequences at once, at most.
        max_prefill_tokens: rows of the prefill micro-batches of all shards together, unless one prompt
            alone is longer.
    """

    shards: tuple[ShardLayout, ...]
    pages: tuple[int, ...]
    layers: int
    max_sequences: int
    max_prefill_tokens: int


# Prompts that begin together, in units of ``max_prefill_tokens``, at most.
COHORT_PREFILLS = 32
# Decode steps for which a prefill may hold up streams that run: less than 2, as it goes on by whole blocks,
# while nobody else waits; when others do, long enough to fill the memory that sequences leave.
QUIET_SLICE, BUSY_SLICE = 1.3, 4.0


class Scheduler:
    """Mixes prefill and decode into micro-batches and keeps every shard busy.

    At most one release, and as many prefills and decode micro-batches each as there are shards, are under
    way. A sequence is admitted only if its peak fits on every shard, so that no step can run out of pages.

    Attributes:
        queued: requests that wait outside for room.
    """

    def __init__(self, layout: PipelineLayout) -> None:
        self.layout = layout
        self.ledger = Ledger(layout.pages, layout.max_sequences)
        self.sequences: dict[int, RunningSequence] = {}
        self.queued = 0
        self._waiting: deque[int] = deque()
        self._cohorts = Cohorts()
        self._ready: deque[int] = deque()
        self._ended: deque[int] = deque()
        self._under_way: dict[int, StepKind] = {}
        self._steps = 0

    @property
    def steps_under_way(self) -> int:
        return len(self._under_way)

    def pages(self, request: SequenceRequest) -> tuple[int, ...]:
        """Pages that ``request`` takes of each shard at its peak."""
        keep = plan(request.compression, len(request.prompt_ids), self.layout.layers)
        return tuple(peak_pages(keep, shard, request.max_tokens) for shard in self.layout.shards)

    def admit(self, sequence: RunningSequence) -> bool:
        """Reserves the peak of ``sequence`` and queues its prefill; False if there is no room now."""
        pages = self.pages(sequence.request)
        if not self.ledger.fits(pages):
            return False
        key = sequence.request.sequence
        self.ledger.reserve(key, pages)
        self.sequences[key] = sequence
        self._waiting.append(key)
        return True

    def cancel(self, key: int) -> bool:
        """Ends a sequence as soon as no step carries it.

        Returns whether it is gone already, as it had not begun; else its release will tell.
        """
        sequence = self.sequences.get(key)
        if sequence is None:
            return False
        if key in self._waiting:
            self._waiting.remove(key)
            self._ready.extend(self._cohorts.remove(key))
            self._forget(key)
            return True
        sequence.cancelled = True
        ready = key in self._ready
        if ready:
            self._ready.remove(key)
        if ready or self._cohorts.rests(key):
            self._cohorts.remove(key)
            self._ended.append(key)
        return False

    def next_step(self) -> tuple[Step, npt.NDArray[np.int64]] | None:
        """The next step to send down the pipeline and its token ids [rows]; None: wait for results."""
        kinds = list(self._under_way.values())
        if self._ended and StepKind.RELEASE not in kinds:
            return self._release()
        if self._ready and kinds.count(StepKind.DECODE) < len(self.layout.shards):
            return self._decode()
        if self._waiting and kinds.count(StepKind.PREFILL) < len(self.layout.shards):
            return self._prefill()
        return None

    def finish_step(self, step: Step) -> None:
        """Takes note that ``step`` has passed all shards; outputs have been accepted before."""
        del self._under_way[step.number]
        if step.kind is StepKind.RELEASE:
            for key in step.sequences:
                self._forget(key)
            return
        ended = [key for key in step.sequences if self.sequences[key].ended]
        going_on = [key for key in step.sequences if key not in ended]
        self._ended.extend(ended)
        if step.kind is StepKind.PREFILL:
            self._ready.extend(self._cohorts.prefilled(step.sequences, going_on))
            return
        for key in ended:
            self._cohorts.remove(key)
        self._ready.extend(key for key in going_on if not self._cohorts.rest(key))

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every reservation belongs to a live sequence."""
        self.ledger.check_integrity()

    def _forget(self, key: int) -> None:
        self.ledger.release(key)
        del self.sequences[key]

    def _form_cohort(self) -> None:
        """Makes those a cohort that wait now, as far as COHORT_PREFILLS micro-batches go."""
        keys: list[int] = []
        room = COHORT_PREFILLS * self.layout.max_prefill_tokens
        for key in self._waiting:
            room -= len(self._request(key).prompt_ids)
            if room < 0 and keys:
                break
            keys.append(key)
        self._cohorts.form(keys)

    def _release(self) -> tuple[Step, npt.NDArray[np.int64]]:
        step = self._step(StepKind.RELEASE, tuple(self._ended))
        self._ended.clear()
        return step, np.zeros(0, dtype=np.int64)

    def _prefill(self) -> tuple[Step, npt.NDArray[np.int64]]:
        if self._waiting[0] not in self._cohorts:
            self._form_cohort()
        keys = [self._waiting.popleft()]
        tokens = len(self._request(keys[0]).prompt_ids)
        # Smaller ones with more shards, so that all of these have something to do soon.
        limit = self.layout.max_prefill_tokens // len(self.layout.shards)
        while self._waiting:
            more = len(self._request(self._waiting[0]).prompt_ids)
            same = self._cohorts.same(keys[0], self._waiting[0])
            if not same or tokens + more > limit:
                break
            tokens += more
            keys.append(self._waiting.popleft())
        requests = [self._request(key) for key in keys]
        step = self._step(
            StepKind.PREFILL,
            tuple(keys),
            rows=tuple(len(request.prompt_ids) for request in requests),
            positions=[np.arange(len(request.prompt_ids)) for request in requests],
            new=tuple(_spec(request) for request in requests),
            slice_steps=BUSY_SLICE if self.queued or self._waiting else QUIET_SLICE,
        )
        return step, np.array([token for request in requests for token in request.prompt_ids])

    def _decode(self) -> tuple[Step, npt.NDArray[np.int64]]:
        decoding = sum(bool(sequence.output_ids) for sequence in self.sequences.values())
        group = min(len(self._ready), -(-decoding // len(self.layout.shards)))
        keys = tuple(self._ready.popleft() for _ in range(group))
        sequences = [self.sequences[key] for key in keys]
        ends = [len(s.request.prompt_ids) + len(s.output_ids) - 1 for s in sequences]
        step = self._step(StepKind.DECODE, keys, rows=(1,) * group, positions=[np.array(ends)])
        return step, np.array([sequence.output_ids[-1] for sequence in sequences])

    def _step(
        self,
        kind: StepKind,
        keys: tuple[int, ...],
        rows: tuple[int, ...] = (),
        positions: Sequence[npt.NDArray[np.int64]] = (),
        new: tuple[SequenceSpec, ...] = (),
        slice_steps: float = 0.0,
    ) -> Step:
        self._steps += 1
        self._under_way[self._steps] = kind
        sequences = [self.sequences[key] for key in keys]
        return Step(
            number=self._steps,
            kind=kind,
            sequences=keys,
            rows=rows,
            positions=np.concatenate([np.zeros(0), *positions]).astype(np.int32),
            output_indices=tuple(len(sequence.output_ids) for sequence in sequences),
            forced=tuple(sequence.forced for sequence in sequences),
            new=new,
            slice_steps=slice_steps,
        )

    def _request(self, key: int) -> SequenceRequest:
        return self.sequences[key].request


def _spec(request: SequenceRequest) -> SequenceSpec:
    return SequenceSpec(
        sequence=request.sequence,
        prompt_tokens=len(request.prompt_ids),
        compression=request.compression,
        sampling=request.sampling,
        trace=request.trace,
    )
