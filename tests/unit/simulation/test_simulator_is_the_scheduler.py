"""The simulated pipeline decides as the scheduler does, and comes to the same times."""

import dataclasses
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass

import pytest
from fake_pipeline import Spoken
from timed_pipeline import TimedPipeline

from cluster.admit.ledger import PipelineLedger
from cluster.simulation.pipeline import SimulatedPipeline
from cluster.simulation.setup import USUAL, Setup, gpu_setup
from cluster.simulation.timing import Timing
from cluster.simulation.turn import SimulatedTurn, simulated_turn
from pyramidserve.types import Compression
from workers.budget.footprint import ShardLayout
from workers.engine.loop import EngineLoop, SequenceFinished, SequenceTokens
from workers.schedule.memory import PipelineLayout
from workers.schedule.sequence import SequenceRequest

# Two decode rounds: a first token waits for whole rounds, and for whole blocks of others' prefills.
SLACK = 0.02
FULL, PRUNE = Compression("full"), Compression("pyramid", "prune", kv_keep=0.45)


@dataclass(frozen=True)
class Arrival:
    """A turn that comes to the pipeline; all of its tokens are expected."""

    moment: float
    prompt: int
    answer: int


@dataclass
class Ran:
    """What became of an arrival; moments in seconds."""

    first: float = math.nan
    ended: float = math.nan
    preemptions: int = 0


def setup(shards: int, compression: Compression, tokens: int) -> Setup:
    """A 7b on ``shards`` GPUs, whose pool has room for so many ``tokens`` uncompressed."""
    whole = gpu_setup("7b", shards, compression, USUAL, 1, None)
    pool = -(-tokens // 16) * whole.model.layers // shards * whole.page_bytes
    return dataclasses.replace(whole, pool_bytes=pool)


def scheduled(of: Setup, arrivals: list[Arrival]) -> list[Ran]:
    """The scheduler's run, through the engine's loop."""
    stages = of.stages()
    pages = tuple(stage.pages_total for stage in stages)
    layout = PipelineLayout(
        shards=tuple(ShardLayout(each.first_layer, each.end_layer, of.page_bytes) for each in stages),
        pages=pages,
        host_pages=tuple(100 * each for each in pages),
        layers=of.model.layers,
        max_sequences=of.max_sequences,
        max_sessions=0,
        max_prefill_tokens=of.max_prefill_tokens,
    )
    pipeline = TimedPipeline(of)
    loop, ran = EngineLoop(layout, pipeline, Spoken(), ()), [Ran() for _ in arrivals]
    coming = deque(enumerate(arrivals))
    while coming or not loop.idle:
        if loop.idle:
            pipeline.now = max(pipeline.now, coming[0][1].moment)
        while coming and coming[0][1].moment <= pipeline.now:
            key, arrival = coming.popleft()
            turn = simulated_turn(arrival.prompt, arrival.answer, arrival.answer, of.compression, "", 0.0)
            request = turn.request
            parts = request.prompt_ids, request.sampling, request.stopping, request.compression
            assert loop.admit(SequenceRequest(key, str(key), *parts))
        collected = pipeline.collected
        events = loop.advance()
        assert loop.idle or pipeline.collected > collected, "nobody goes on"
        for event in events:
            if isinstance(event, SequenceTokens):
                ran[event.sequence].ended = pipeline.now
                if event.tokens.index == 0:
                    ran[event.sequence].first = pipeline.now
            elif isinstance(event, SequenceFinished):
                ran[event.sequence].preemptions = event.receipt.preemptions
        loop.scheduler.check_integrity()
    return ran


def simulated(of: Setup, arrivals: list[Arrival]) -> list[Ran]:
    """The simulator's run."""
    timing = Timing(of.model, of.itemsize, of.shards, of.limits, of.costs)
    ledger = PipelineLedger("p", of.stages(), of.max_sequences)
    pipeline = SimulatedPipeline(ledger, timing, of.model.layers, of.page_bytes, of.max_prefill_tokens, 0.0)
    turns: list[SimulatedTurn] = []
    now, coming = 0.0, deque(arrivals)
    while True:
        while coming and coming[0].moment <= now:
            one = coming.popleft()
            turns.append(simulated_turn(one.prompt, one.answer, one.answer, of.compression, "", now))
            pipeline.start(len(turns) - 1, turns[-1], one.answer)
        pipeline.step(now, False)
        waits = [pipeline.until_change(), coming[0].moment - now if coming else None]
        if (wait := min((each for each in waits if each is not None), default=None)) is None:
            break
        now = coming[0].moment if coming and wait == waits[1] else now + wait
    return [Ran(each.first_token, each.ended, each.preemptions) for each in turns]


def order(ran: list[Ran]) -> list[int]:
    """Who had its first token before whom; of several at once, in order of arrival."""
    return sorted(range(len(ran)), key=lambda key: (round(ran[key].first, 6), key))


def running(ran: list[Ran], moment: float, certain: bool) -> set[int]:
    """Who has output and goes on at a moment; ``certain``: and has and does a little before and behind."""
    slack = SLACK if certain else 0.0
    return {key for key, each in enumerate(ran) if each.first + slack <= moment < each.ended - slack}


QUIET = [Arrival(1.5 * i, 900 + 200 * i, 80) for i in range(5)]
BURST = [Arrival(0.0, 400 + 150 * (i % 5), 60 + 7 * i) for i in range(8)]
QUEUE = [Arrival(0.0, 1500, 20 + i) for i in range(50)]
STREAM = [Arrival(0.25 * i, 300 + 170 * (i % 6), 100 + 10 * (i % 7)) for i in range(12)]
GROWING = [Arrival(0.02 * i, 600, 300 + 20 * i) for i in range(6)]
CASES = {
    "one at a time": (QUIET, FULL, 100_000),
    "a burst": (BURST, FULL, 100_000),
    "a queue that is longer than a cohort may be": (QUEUE, FULL, 100_000),
    "some come while others run": (STREAM, FULL, 100_000),
    "the same, pruned": (STREAM, PRUNE, 100_000),
    "prompts that wait for an end": (BURST, FULL, 3_000),
    "the youngest makes room and comes back": (GROWING, FULL, 4_400),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_simulator_runs_what_the_scheduler_runs(case: str, shards: int) -> None:
    arrivals, compression, tokens = CASES[case]
    of = setup(shards, compression, tokens)
    real, model = scheduled(of, arrivals), simulated(of, arrivals)
    assert order(model) == order(real)
    for arrival, one, other in zip(arrivals, real, model, strict=True):
        waited, took = one.first - arrival.moment, one.ended - arrival.moment
        assert other.first == pytest.approx(one.first, abs=0.1 * waited + SLACK)
        assert other.ended == pytest.approx(one.ended, abs=0.1 * took)
        assert running(real, arrival.moment, True) <= running(model, arrival.moment, False)
        assert running(model, arrival.moment, True) <= running(real, arrival.moment, False)
    made_room, modelled = ([each.preemptions for each in ran] for ran in (real, model))
    assert sum(made_room) == sum(modelled)
    assert (sum(made_room) > 0) == (arrivals is GROWING)
    if shards == 1:  # else the youngest may be under way in another micro-batch, and the next one does
        assert made_room == modelled


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("seed", [10, 11, 13, 20])
def test_of_a_crowd_in_a_small_pool_the_simulator_knows_the_order_and_the_end(
    seed: int, shards: int
) -> None:
    chance = random.Random(seed)
    moments = itertools.accumulate(chance.expovariate(10) for _ in range(20))
    arrivals = [Arrival(each, chance.randint(50, 1500), chance.randint(2, 300)) for each in moments]
    of = setup(shards, FULL, 3_500)
    real, model = scheduled(of, arrivals), simulated(of, arrivals)
    assert order(model) == order(real)
    assert sum(each.preemptions for each in real) > 0
    assert max(each.ended for each in model) == pytest.approx(max(each.ended for each in real), rel=0.1)
