"""The engine's loop: what the scheduler decides goes through the pipeline, what comes back is accepted."""

import hashlib
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pyramidserve.errors import EngineError, not_finite, policy_failed
from pyramidserve.types import Receipt, Stopping, Tokens
from workers.engine.pipeline import Pipeline
from workers.model.vocabulary import Vocabulary
from workers.policies.registry import plan
from workers.schedule.accept import accept
from workers.schedule.detokenizer import Detokenizer
from workers.schedule.drafts import Drafting
from workers.schedule.memory import PipelineLayout
from workers.schedule.receipt import receipt
from workers.schedule.scheduler import Scheduler
from workers.schedule.sequence import RunningSequence, SequenceRequest
from workers.schedule.step import NOT_FINITE, PrefillTrace, ShardMemory, Step, StepKind, TopLogits
from workers.tools.reader import ToolReader


@dataclass(frozen=True)
class SequenceTokens:
    """New output of one sequence."""

    sequence: int
    tokens: Tokens


@dataclass(frozen=True)
class SequenceFinished:
    """A sequence ended as it should; its memory is free on every shard.

    ``positions``: where it was traced, of what each layer of the model had, int32 [sets, tokens].
    """

    sequence: int
    receipt: Receipt
    positions: tuple[npt.NDArray[np.int32], ...] = ()


@dataclass(frozen=True)
class SequenceCancelled:
    """A sequence was cancelled; its memory is free on every shard."""

    sequence: int


@dataclass(frozen=True)
class SequenceBroken:
    """A sequence's logits were not finite, or its policy failed; its memory is free on every shard."""

    sequence: int
    why: str

    def error(self, request_id: str) -> EngineError:
        """What the request ends with."""
        return not_finite(request_id) if self.why == NOT_FINITE else policy_failed(request_id, self.why)


@dataclass(frozen=True)
class SequenceTraced:
    """What a traced prefill kept, shard by shard, and its first token's best logits."""

    sequence: int
    shards: tuple[PrefillTrace, ...]
    top: TopLogits


LoopEvent = SequenceTokens | SequenceFinished | SequenceCancelled | SequenceBroken | SequenceTraced


class EngineLoop:
    """Runs admitted sequences to their end. Not thread-safe."""

    def __init__(
        self,
        layout: PipelineLayout,
        pipeline: Pipeline,
        vocabulary: Vocabulary,
        eos_ids: Collection[int],
        session_seconds: float = math.inf,
    ) -> None:
        """``session_seconds``: how long a session is parked at most."""
        self.scheduler = Scheduler(layout)
        self.memory: tuple[ShardMemory, ...] = ()
        self._pipeline = pipeline
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._session_seconds = session_seconds
        self._checked = True

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.idle

    def admit(self, request: SequenceRequest) -> bool:
        """Starts a validated request; False if there are too many, or the pool could never hold it."""
        self._checked = False
        keep = plan(request.compression, len(request.prompt_ids), self.scheduler.layout.layers)
        return self.scheduler.admit(
            RunningSequence(
                request=request,
                plan=keep,
                detokenizer=Detokenizer(
                    *(self._vocabulary, request.prompt_ids, request.stopping.stop),
                    include_stop=request.stopping.include_stop,
                ),
                started=time.monotonic(),
                drafting=Drafting(keep.drafts, self.scheduler.layout.tuning) if keep.drafts else None,
                banned=self._banned(request.stopping),
                reader=ToolReader(request.calls, call_names(request)) if request.calls else None,
            )
        )

    def cancel(self, sequence: int) -> list[LoopEvent]:
        """Ends a sequence; a later event confirms it unless this one does."""
        return [SequenceCancelled(sequence)] if self.scheduler.cancel(sequence) else []

    def end_session(self, session_id: str) -> None:
        """Gives up what is parked of a session."""
        self.scheduler.end_session(session_id)

    def advance(self) -> list[LoopEvent]:
        """Sends all steps that can go, then waits for one to come back.

        Returns what it brought; nothing if no sequence is here. Sessions expire here.
        """
        if self.scheduler.parked:
            self.scheduler.expire(time.monotonic() - self._session_seconds)
        while (work := self.scheduler.next_step()) is not None:
            step, tokens = work
            self._pipeline.submit(step, torch.from_numpy(tokens))
        if not self.scheduler.steps_under_way:
            return []
        self._checked = False
        step, drawn = self._pipeline.collect()
        self.memory = step.memory
        events: list[LoopEvent] = []
        match step.kind:
            case StepKind.PREFILL | StepKind.DECODE | StepKind.VERIFY:
                events = self._accept(step, drawn)
            case StepKind.RELEASE | StepKind.PARK:
                events = self._ended(step)
        self.scheduler.finish_step(step)
        return events

    def check_idle(self) -> None:
        """Checks the scheduler's books once whenever the engine has become idle. Raises IntegrityError."""
        if self.idle and not self._checked:
            self.scheduler.check_integrity()
            self._checked = True

    def _banned(self, stopping: Stopping) -> tuple[int, ...]:
        """What may not be drawn before ``min_tokens``."""
        if not stopping.min_tokens:
            return ()
        ends = () if stopping.ignore_eos else self._eos_ids
        return tuple({*ends, *stopping.stop_token_ids})

    def _accept(self, step: Step, drawn: tuple[int, ...]) -> list[LoopEvent]:
        events: list[LoopEvent] = []
        for top in step.top_logits:
            shards = tuple(trace for trace in step.traces if trace.sequence == top.sequence)
            events.append(SequenceTraced(top.sequence, shards, top))
        new = accept(step, drawn, self.scheduler.sequences, self._eos_ids, time.monotonic())
        return events + [SequenceTokens(key, tokens) for key, tokens in new]

    def _ended(self, step: Step) -> list[LoopEvent]:
        events: list[LoopEvent] = []
        for row, key in enumerate(step.sequences):
            sequence = self.scheduler.sequences.get(key)
            # Others were sessions that are given up, or make room for others.
            if sequence is None:
                continue
            if sequence.cancelled:
                events.append(SequenceCancelled(key))
            elif sequence.finish_reason is not None:
                reports = [shard[row] for shard in step.released]
                positions = tuple(own for shard in reports for own in shard.positions)
                events.append(
                    SequenceFinished(
                        key, receipt(sequence, reports, self.scheduler.layout.shards[0].kv_share), positions
                    )
                )
            elif sequence.broken:
                events.append(SequenceBroken(key, sequence.broken))
        return events


def call_names(request: SequenceRequest) -> Callable[[int], str]:
    """How the calls in a reply are named: the same in a replay, and others in other turns."""
    asked = np.asarray(request.prompt_ids, np.int32).tobytes() + str(request.sampling.seed).encode()
    # Nine letters and digits, as Mistral's templates want them.
    return lambda number: hashlib.sha256(asked + b" %d" % number).hexdigest()[:9]
