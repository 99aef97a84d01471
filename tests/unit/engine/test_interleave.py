"""Who goes next on a shard: a long prefill holds running streams up for two of their steps at most."""

from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.interleave import Interleave, Work
from workers.schedule.step import Step, StepKind

NOTHING, SLICE_STEPS = torch.zeros(0), 1.5


@dataclass
class Blocks:
    """A prefill whose blocks take ``seconds`` each."""

    step: Step
    clock: "Clock"
    seconds: deque[float]

    def advance(self) -> bool:
        if not self.seconds:
            return False
        self.clock.now += self.seconds.popleft()
        return True


@dataclass
class Clock:
    now: float = 0.0


@dataclass
class ScriptedWorker:
    """Steps take as long as ``decode`` and ``blocks`` say; remembers when each decode ended."""

    clock: Clock = field(default_factory=Clock)
    decode: float = 1.0
    blocks: tuple[float, ...] = (0.5,) * 20
    decoded: list[float] = field(default_factory=list)

    def run(self, step: Step, inputs: torch.Tensor) -> Work:
        if step.kind is StepKind.DECODE:
            self.clock.now += self.decode
            self.decoded.append(self.clock.now)
        return step, inputs

    def begin(self, step: Step, inputs: torch.Tensor) -> Blocks:
        return Blocks(step, self.clock, deque(self.blocks))

    def finish(self, prefill: Blocks) -> Work:
        return prefill.step, NOTHING


def interleave_of(worker: ScriptedWorker) -> Interleave[Blocks]:
    return Interleave(worker, clock=lambda: worker.clock.now)


def step(number: int, kind: StepKind) -> Step:
    return Step(number, kind, (number,), slice_steps=SLICE_STEPS)


def test_short_steps_come_in_order_and_prefills_do() -> None:
    steps = interleave_of(ScriptedWorker())
    kinds = [StepKind.PREFILL, StepKind.RELEASE, StepKind.PREFILL, StepKind.DECODE, StepKind.DECODE]
    for number, kind in enumerate(kinds):
        steps.add(step(number, kind), NOTHING)
    passed = []
    while not steps.idle:
        if done := steps.advance():
            passed.append(done[0].number)
    assert [number for number in passed if kinds[number] is StepKind.PREFILL] == [0, 2]
    assert [number for number in passed if kinds[number] is not StepKind.PREFILL] == [1, 3, 4]
    assert passed.index(3) < passed.index(0)


def test_a_lone_prefill_runs_on() -> None:
    worker = ScriptedWorker()
    steps = interleave_of(worker)
    steps.add(step(1, StepKind.PREFILL), NOTHING)
    count = 0
    while steps.advance() is None:
        count += 1
    assert count == len(worker.blocks)
    assert worker.clock.now == sum(worker.blocks)
    assert steps.idle


@given(
    decode=st.floats(0.5, 3),
    blocks=st.lists(st.floats(0.05, 1), min_size=1, max_size=60),
    arrives=st.integers(0, 5),
)
def test_a_stream_waits_for_a_slice_and_a_block_at_most(
    decode: float, blocks: list[float], arrives: int
) -> None:
    worker = ScriptedWorker(decode=decode, blocks=tuple(blocks))
    steps = interleave_of(worker)
    for number in range(arrives):
        steps.add(step(number, StepKind.DECODE), NOTHING)
        steps.advance()
    steps.add(step(99, StepKind.PREFILL), NOTHING)
    number, prefilled = 100, False
    steps.add(step(number, StepKind.DECODE), NOTHING)
    while not prefilled:
        done = steps.advance()
        if done and done[0].kind is StepKind.DECODE:
            number += 1
            steps.add(step(number, StepKind.DECODE), NOTHING)
        prefilled = done is not None and done[0].kind is StepKind.PREFILL
    gaps = [
        later - sooner - decode for sooner, later in zip(worker.decoded, worker.decoded[1:], strict=False)
    ]
    assert all(gap <= SLICE_STEPS * decode + 2 * max(blocks) + 1e-9 for gap in gaps)


def test_equal_blocks_are_foreseen_and_do_not_go_over() -> None:
    worker = ScriptedWorker(decode=2.0, blocks=(0.5,) * 40)
    steps = interleave_of(worker)
    steps.add(step(0, StepKind.DECODE), NOTHING)
    steps.advance()
    steps.add(step(1, StepKind.PREFILL), NOTHING)
    for number in range(2, 8):
        steps.add(step(number, StepKind.DECODE), NOTHING)
    while len(worker.decoded) < 7:
        steps.advance()
    gaps = {later - sooner for sooner, later in zip(worker.decoded, worker.decoded[1:], strict=False)}
    assert gaps == {2.0 + 2.0 * SLICE_STEPS}


@pytest.mark.parametrize("decode", [0.01, 0.2])
def test_a_prefill_comes_forward_however_short_decode_steps_are(decode: float) -> None:
    worker = ScriptedWorker(decode=decode, blocks=(1.0,) * 5)
    steps = interleave_of(worker)
    steps.add(step(0, StepKind.PREFILL), NOTHING)
    count = 0
    while True:
        steps.add(step(1, StepKind.DECODE), NOTHING)
        done = steps.advance()
        if done and done[0].kind is StepKind.PREFILL:
            break
        count += 1
        assert count < 20


def test_what_each_step_and_block_took_is_told() -> None:
    worker, told = ScriptedWorker(blocks=(0.25, 0.5)), []
    steps = Interleave(worker, lambda kind, seconds: told.append((kind, seconds)), lambda: worker.clock.now)
    steps.add(step(0, StepKind.DECODE), NOTHING)
    steps.add(step(1, StepKind.RELEASE), NOTHING)
    steps.advance()
    steps.advance()
    steps.add(step(2, StepKind.PREFILL), NOTHING)
    while steps.advance() is None:
        pass
    kinds = [StepKind.DECODE, StepKind.RELEASE, *[StepKind.PREFILL] * 3]
    assert told == list(zip(kinds, [1.0, 0.0, 0.25, 0.5, 0.0], strict=True))
