"""A pipeline without a model whose shards take the time that the simulator's timing says."""

import itertools
from collections import deque

import torch
from fake_pipeline import FakePipeline

from cluster.simulation.setup import Setup
from cluster.simulation.timing import Timing
from workers.budget.pages import pages_for
from workers.budget.plan import KeepPlan
from workers.engine.interleave import Interleave, Work
from workers.engine.pipeline import Outcome
from workers.policies.registry import plan
from workers.schedule.step import Step, StepKind

# Of a prefill on a shard; decode steps go between them.
BLOCKS = 64


class _Prefill:
    """A prefill on its way through a shard."""

    def __init__(self, shard: "_Shard", work: Work, seconds: float) -> None:
        self.work = work
        self._shard, self._block = shard, seconds / BLOCKS
        self._blocks = iter(range(BLOCKS - 1))

    def advance(self) -> bool:
        self._shard.now += self._block
        return next(self._blocks, None) is not None


class _Shard:
    """A shard with a time of its own, and what is on its way to it.

    Attributes:
        now: seconds until which it has worked.
        coming: when each step that has not come yet does.
    """

    def __init__(self, setup: Setup, plans: dict[int, KeepPlan]) -> None:
        self.now = 0.0
        self.coming: deque[tuple[float, Work]] = deque()
        self._setup, self._plans = setup, plans
        # An equal part of what one shard would take.
        self._timing = Timing(setup.model, setup.itemsize, 1, setup.limits, setup.costs)
        self._interleave: Interleave[_Prefill] = Interleave(self, clock=lambda: self.now)

    @property
    def next(self) -> float:
        """When it can go on; infinite if there is nothing to do."""
        if not self._interleave.idle:
            return self.now
        return max(self.now, self.coming[0][0]) if self.coming else float("inf")

    def advance(self) -> Work | None:
        """Goes on; returns what has passed it by that."""
        self.now = self.next
        while self.coming and self.coming[0][0] <= self.now:
            self._interleave.add(*self.coming.popleft()[1])
        return self._interleave.advance()

    def run(self, step: Step, inputs: torch.Tensor) -> Work:
        """Decodes; all that moves is taken to cost nothing."""
        if step.kind is StepKind.DECODE:
            layers = range(self._setup.model.layers)
            pages = sum(
                pages_for(self._plans[key].tokens(layer, fed))
                for key, fed in zip(step.sequences, step.generated, strict=True)
                for layer in layers
            )
            kv_bytes = pages * self._setup.page_bytes
            self.now += self._timing.decode_round(len(step.sequences), kv_bytes) / self._setup.shards
        return step, inputs

    def begin(self, step: Step, inputs: torch.Tensor) -> _Prefill:
        for spec in step.new:
            keep = plan(spec.compression, spec.prompt_tokens, self._setup.model.layers)
            self._plans[spec.sequence] = keep
        seconds = self._timing.prefill([self._plans[key] for key in step.sequences])
        return _Prefill(self, (step, inputs), seconds / self._setup.shards)

    def finish(self, prefill: _Prefill) -> Work:
        return prefill.work


class TimedPipeline:
    """Shards that work at the same time; what they say at last is a ``FakePipeline``'s.

    Attributes:
        now: seconds at the head, which waits for steps to come back.
        collected: how many have.
    """

    def __init__(self, setup: Setup) -> None:
        plans: dict[int, KeepPlan] = {}
        self.now, self.collected = 0.0, 0
        self._shards = [_Shard(setup, plans) for _ in range(setup.shards)]
        self._outcomes = FakePipeline(shards=setup.shards)

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        self._shards[0].coming.append((self.now, (step, tokens)))

    def collect(self) -> Outcome:
        while True:
            shard = min(self._shards, key=lambda each: each.next)
            assert shard.next < float("inf"), "no step is under way"
            done = shard.advance()
            if done is None:
                continue
            if shard is self._shards[-1]:
                self.now = max(self.now, shard.now)
                self.collected += 1
                self._outcomes.submit(*done)
                return self._outcomes.collect()
            following = dict(itertools.pairwise(self._shards))[shard]
            following.coming.append((shard.now, done))
