"""A simulated pipeline against times and pages counted by hand."""

import math
from dataclasses import replace

import pytest
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.admit.ledger import PipelineLedger
from cluster.simulation.pipeline import SimulatedPipeline
from cluster.simulation.setup import Setup
from cluster.simulation.timing import Costs, Timing
from cluster.simulation.turn import SimulatedTurn, simulated_turn
from pyramidserve.types import Compression
from workers.model.shapes import SHAPES
from workers.model.work import Limits, prefill_flops, weights_read
from workers.policies.registry import plan
from workers.schedule.tuning import ScheduleTuning

MODEL = replace(
    SHAPES["toy"],
    layers=2,
    hidden=8,
    heads=2,
    kv_heads=2,
    head_size=4,
    intermediate=16,
    vocabulary=50,
    context=4096,
    eos_ids=(),
)
LIMITS, COSTS = Limits(1e6, 1e8), Costs(weights=2.0, kv=3.0, rows=4.0, prefill=5.0)
FULL = Compression("full")
WEIGHTS = weights_read(MODEL)
MOST_STEPS = 10_000


def setup(pages: int = 1000, shards: int = 1) -> Setup:
    """A pool of ``pages`` of each shard."""
    whole = Setup(MODEL, 4, shards, LIMITS, COSTS, 0, FULL)
    return Setup(MODEL, 4, shards, LIMITS, COSTS, pages * whole.page_bytes, FULL)


def pipeline(pages: int = 1000, shards: int = 1) -> SimulatedPipeline:
    of = setup(pages, shards)
    timing = Timing(MODEL, 4, shards, LIMITS, COSTS)
    ledger = PipelineLedger("p", of.stages(), 64)
    return SimulatedPipeline(ledger, timing, MODEL.layers, of.page_bytes, of.max_prefill_tokens, 0.0)


def turn(prompt: int, answer: int) -> SimulatedTurn:
    return simulated_turn(prompt, answer, answer, FULL, "", 0.0)


def run(simulated: SimulatedPipeline, now: float = 0.0) -> float:
    """Lets all end that is there; returns when."""
    simulated.step(now, False)
    for _ in range(MOST_STEPS):
        wait = simulated.until_change()
        if wait is None:
            return now
        now += wait
        simulated.step(now, False)
    raise AssertionError(f"after {MOST_STEPS} steps it is {now} s, and sequences still run")


def prefill_seconds(prompt: int) -> float:
    return 5.0 * prefill_flops(plan(FULL, prompt, MODEL.layers), MODEL) / 1e8


def test_a_round_reads_the_weights_and_the_kv_and_multiplies_the_rows() -> None:
    one, three = (Timing(MODEL, 4, shards, LIMITS, COSTS) for shards in (1, 3))
    weights = 2.0 * WEIGHTS * 4 / 1e6
    rest = 3.0 * 600 / 1e6 + 4.0 * 2 * WEIGHTS * 7 / 1e8
    assert one.decode_round(7, 600) == pytest.approx(weights + rest)
    # Each shard has a third, and reads its weights for each part of the sequences: of 3, 3 and 1.
    assert three.decode_round(7, 600) == pytest.approx(weights + rest * 3 / 7)
    assert three.decode_round(1, 600) == pytest.approx(one.decode_round(1, 600))
    keep = plan(FULL, 500, MODEL.layers)
    assert three.prefill([keep]) == pytest.approx(one.prefill([keep]) / 3)


def test_one_alone_is_prefilled_and_decoded() -> None:
    simulated, alone = pipeline(), turn(160, 2)
    simulated.start(1, alone, 2)
    assert run(simulated) == pytest.approx(alone.ended)
    assert alone.first_token == pytest.approx(prefill_seconds(160))
    page = setup().page_bytes
    # Pages grow by a part of one a token.
    least = Timing(MODEL, 4, 1, LIMITS, COSTS).decode_round(1, 2 * 10 * page)
    assert least <= alone.ended - alone.first_token <= 1.1 * least


def test_those_that_wait_together_decode_together_but_for_a_round_behind_each_prefill() -> None:
    simulated = pipeline()
    turns = [turn(1600, 6), turn(1200, 5)]
    for number, each in enumerate(turns):
        simulated.start(number, each, each.answer_tokens)
    run(simulated)
    assert turns[0].first_token == pytest.approx(prefill_seconds(1600))
    kv_bytes = 2 * 100 * setup().page_bytes
    round_seconds = Timing(MODEL, 4, 1, LIMITS, COSTS).decode_round(1, kv_bytes)
    assert turns[1].first_token == pytest.approx(
        turns[0].first_token + prefill_seconds(1200) + round_seconds, rel=1e-3
    )
    assert turns[0].ended == pytest.approx(turns[1].ended)


def test_prompts_share_a_prefill_as_far_as_its_rows_go() -> None:
    simulated = pipeline()
    turns = [turn(160, 5), turn(320, 5), turn(1600, 5)]
    for number, each in enumerate(turns):
        simulated.start(number, each, each.answer_tokens)
    run(simulated)
    both = prefill_seconds(160) + prefill_seconds(320)
    assert turns[0].first_token == turns[1].first_token == pytest.approx(both)
    assert turns[2].first_token > both + prefill_seconds(1600)


def test_a_prefill_leaves_a_part_of_the_time_to_those_that_decode() -> None:
    simulated = pipeline()
    first, late = turn(16, 2000), turn(1600, 2)
    simulated.start(1, first, 2000)
    simulated.step(0.0, False)
    began = simulated.until_change()
    assert began is not None
    simulated.step(began, False)
    simulated.start(2, late, 2)
    run(simulated, began)
    share = ScheduleTuning().quiet_slice / (1 + ScheduleTuning().quiet_slice)
    assert late.first_token == pytest.approx(began + prefill_seconds(1600) / share)


def test_shards_prefill_one_behind_the_other() -> None:
    simulated = pipeline(shards=2)
    turns = [turn(1600, 1), turn(1600, 1), turn(1600, 1)]
    for number, each in enumerate(turns):
        simulated.start(number, each, each.answer_tokens)
    run(simulated)
    first, second, third = (each.first_token / prefill_seconds(1600) for each in turns)
    assert (first, second, third) == pytest.approx((1.0, 1.5, 2.0))


def test_what_does_not_fit_waits_for_an_end() -> None:
    simulated = pipeline(pages=2 * 12)
    turns = [turn(160, 20), turn(160, 20)]
    for number, each in enumerate(turns):
        simulated.start(number, each, each.answer_tokens)
    run(simulated)
    assert turns[1].first_token == pytest.approx(turns[0].ended + prefill_seconds(160))


@pytest.mark.parametrize(
    ("pages", "sizes"),
    [(25, ((160, 100), (160, 100))), (12, ((160, 20), (1, 15)))],
    ids=["both grow", "the youngest does not grow"],
)
def test_the_youngest_makes_room_and_comes_back(pages: int, sizes: tuple[tuple[int, int], ...]) -> None:
    simulated = pipeline(2 * pages)
    turns = [turn(*each) for each in sizes]
    for number, each in enumerate(turns):
        simulated.start(number, each, each.answer_tokens)
    run(simulated)
    assert [each.preemptions for each in turns] == [0, 1]
    assert turns[0].ended < turns[1].ended


@settings(max_examples=examples(50))
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=12),
    st.integers(2 * 40, 2 * 120),
)
def test_all_end_and_leave_nothing(sizes: list[tuple[int, int]], pages: int) -> None:
    simulated = pipeline(pages)
    turns = [turn(*each) for each in sizes]
    for number, each in enumerate(turns):
        simulated.start(number, each, each.answer_tokens)
    end = run(simulated)
    assert all(0 < each.first_token <= each.ended <= end for each in turns)
    assert max(each.ended for each in turns) == pytest.approx(end)
    used = simulated.page_seconds
    simulated.step(end + 10.0, False)
    assert simulated.page_seconds == pytest.approx(used, abs=1e-3)
    assert used <= simulated.capacity(end)
    assert not math.isnan(used)
