"""A shard's steps interleaved: short ones go between the blocks of a prefill."""

import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from workers.schedule.step import Step, StepKind

Work = tuple[Step, torch.Tensor]
OnAdvance = Callable[[StepKind, float], None]


def unobserved(kind: StepKind, seconds: float) -> None:
    """An ``OnAdvance`` for those who do not want to know."""


class Advancing(Protocol):
    """Work that is done in blocks; see ``Prefill``."""

    def advance(self) -> bool:
        """Computes one more block; False once there is none left."""
        ...


Begun = TypeVar("Begun", bound=Advancing)


class Worker(Protocol[Begun]):
    """What an interleave needs of a shard; see ``workers.engine.stage``."""

    def run(self, step: Step, inputs: torch.Tensor) -> Work:
        """Runs any step but a prefill."""
        ...

    def begin(self, step: Step, inputs: torch.Tensor) -> Begun:
        """Begins a prefill."""
        ...

    def finish(self, prefill: Begun) -> Work:
        """Ends a prefill all of whose blocks are done."""
        ...


class Interleave(Generic[Begun]):
    """Steps that have come to a shard and not passed it. Prefills keep their order, as do the others."""

    def __init__(
        self,
        worker: Worker[Begun],
        on_advance: OnAdvance = unobserved,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``on_advance`` is told what each step, or block of a prefill, took."""
        self._worker, self._on_advance, self._clock = worker, on_advance, clock
        self._short: deque[Work] = deque()
        self._prefills: deque[Work] = deque()
        self._prefill: Begun | None = None
        self._slice_steps = 0.0
        # A step now and then takes longer, as compression is due.
        self._last_decodes: deque[float] = deque(maxlen=2)
        # Of the prefill since the last decode, and of its last block.
        self._slice_seconds = self._block_seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._short or self._prefills or self._prefill)

    def add(self, step: Step, inputs: torch.Tensor) -> None:
        """Takes a step in; ``inputs`` are given away."""
        (self._prefills if step.kind is StepKind.PREFILL else self._short).append((step, inputs))

    @torch.inference_mode()
    def advance(self) -> Work | None:
        """Runs a step, or a block of a prefill; returns what has passed the shard by that."""
        began = self._clock()
        if self._short and (self._slice_is_over() or not (self._prefill or self._prefills)):
            step, inputs = self._short.popleft()
            done: Work | None = self._worker.run(step, inputs)
            seconds = self._clock() - began
            if step.kind is StepKind.DECODE:
                self._last_decodes.append(seconds)
                self._slice_seconds = 0.0
            self._on_advance(step.kind, seconds)
            return done
        if self._prefill is None:
            step, inputs = self._prefills.popleft()
            self._slice_steps = step.slice_steps
            self._prefill = self._worker.begin(step, inputs)
        done = None
        if not self._prefill.advance():
            done = self._worker.finish(self._prefill)
            self._prefill = None
        self._block_seconds = self._clock() - began
        self._slice_seconds += self._block_seconds
        self._on_advance(StepKind.PREFILL, self._block_seconds)
        return done

    def _slice_is_over(self) -> bool:
        """Whether the prefill has had its share since the last decode; one block at least.

        While a decode waits, a prefill goes on for ``slice_steps`` times what the last decodes took.
        """
        after_one_more = self._slice_seconds + self._block_seconds
        limit = self._slice_steps * min(self._last_decodes, default=0.0)
        return self._slice_seconds > 0 and after_one_more > limit
