"""The pyramid's counts: as the authors' code has them, and as a kept fraction asks for them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.policy import Target
from workers.policies.pyramid import PyramidKnobs, plan_pyramid

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "schedule_counts.json").read_text())
PREFILLS = ("prune", "evict")
LAYERS = range(12, 81)

prefills = st.sampled_from(PREFILLS)
shares = st.floats(0.01, 1)
knobs = st.builds(
    PyramidKnobs,
    recent_ratio=st.floats(0, 0.99),
    prefill_decay_ratio=shares,
    min_context_length=st.integers(0, 200),
    layerwise_downsample_interval=st.integers(1, 5),
    streamingllm_sink_len=st.integers(0, 8),
    distance_weight=st.floats(0.5, 4),
    exceed_length_to_compress=st.integers(1, 40),
    gen_compress_ratio=shares,
    gen_decay_ratio=shares,
)


def solved(kv_keep: float, prompt_tokens: int, layers: int, prefill: str = "evict") -> KeepPlan:
    return plan_pyramid(Target(prompt_tokens, layers, kv_keep, prefill == "prune"), PyramidKnobs())


def obeyed(parameters: PyramidKnobs, prompt_tokens: int, layers: int, prefill: str) -> KeepPlan:
    return plan_pyramid(Target(prompt_tokens, layers, prunes=prefill == "prune"), parameters)


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.parametrize("prefill", PREFILLS)
def test_counts_are_those_of_the_released_code(case: dict[str, Any], prefill: str) -> None:
    parameters = PyramidKnobs(**case["params"])
    assert obeyed(parameters, case["prompt_len"], 30, prefill).kept == tuple(case["counts"])


@pytest.mark.parametrize("prefill", PREFILLS)
def test_the_default_target_is_met_at_every_length_and_depth(prefill: str) -> None:
    for layers in LAYERS:
        # Other lengths for each depth, so that together they lie dense.
        for prompt_tokens in {512, 8192, *range(512 + layers * 9 % 701, 8193, 701)}:
            plan = solved(0.45, prompt_tokens, layers, prefill)
            assert plan.fraction == pytest.approx(0.45, abs=0.01), (prompt_tokens, layers)
            assert plan.bound_by == "", (prompt_tokens, layers)


@given(st.floats(0.2, 1), st.integers(512, 8192), st.integers(2, 80), prefills)
@example(0.45, 2048, 1, "evict")
@example(0.8, 2048, 2, "prune")
def test_any_target_is_met_unless_the_minimum_context_binds(
    kv_keep: float, prompt_tokens: int, layers: int, prefill: str
) -> None:
    plan = solved(kv_keep, prompt_tokens, layers, prefill)
    if plan.bound_by:
        assert plan.bound_by == "minimum context"
        assert plan.fraction > kv_keep
        assert set(plan.kept[prefill == "prune" :]) == {plan.recent + 64}
    else:
        assert plan.fraction == pytest.approx(kv_keep, abs=0.006)


@pytest.mark.parametrize("prefill", PREFILLS)
def test_what_the_cosine_cannot_reach_falls_along_a_straight_line(prefill: str) -> None:
    plan = solved(0.45, 8192, 30, prefill)
    line = plan.kept[prefill == "prune" :]
    mean = sum(line) / len(line)
    assert (plan.recent, line[0], line[-1]) == (1639, round(1.5 * mean), round(0.5 * mean))
    steps = [a - b for a, b in pairwise(line)]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("prefill", PREFILLS)
def test_short_prompts_keep_more_and_say_why(prefill: str) -> None:
    plans = [solved(0.45, tokens, 30, prefill) for tokens in (150, 120, 100, 80, 66)]
    fractions = [plan.fraction for plan in plans]
    assert fractions == sorted(fractions)
    assert fractions[0] > 0.45
    assert fractions[-1] == 1
    assert {plan.bound_by for plan in plans} == {"minimum context"}


@pytest.mark.parametrize("prefill", PREFILLS)
def test_everything_stays_where_everything_is_asked_for(prefill: str) -> None:
    for tokens in (1, 2, 64, 777, 8192):
        plan = solved(1.0, tokens, 30, prefill)
        assert (set(plan.kept), plan.bound_by) == ({tokens}, "")


@given(st.floats(0.05, 1), st.integers(1, 8192), st.integers(2, 80), prefills)
def test_a_solved_schedule_narrows_with_depth_and_holds_sinks_and_recent_tokens(
    kv_keep: float, prompt_tokens: int, layers: int, prefill: str
) -> None:
    plan = solved(kv_keep, prompt_tokens, layers, prefill)
    assert list(plan.kept) == sorted(plan.kept, reverse=True)
    assert plan.recent >= 1
    assert plan.sinks == min(4, prompt_tokens - plan.recent)
    assert plan.recent + plan.sinks <= plan.kept[-1]
    assert plan.kept[0] <= prompt_tokens
    if prefill == "prune":
        assert plan.kept[0] == prompt_tokens
    assert plan.generation is not None
    assert plan.generation.window >= 32


@given(knobs, st.integers(1, 4000), st.integers(1, 40), prefills)
def test_given_knobs_are_obeyed_exactly(
    parameters: PyramidKnobs, prompt_tokens: int, layers: int, prefill: str
) -> None:
    plan = obeyed(parameters, prompt_tokens, layers, prefill)
    context = prompt_tokens - plan.recent
    assert plan.recent == 1 + int(parameters.recent_ratio * prompt_tokens)
    assert plan.sinks == min(parameters.streamingllm_sink_len, context)
    assert plan.observes == RowAttention(plan.recent, parameters.distance_weight)
    assert plan.drops_hidden_states == (prefill == "prune")
    assert plan.bound_by == ""
    assert plan.kept[0] == prompt_tokens
    assert list(plan.kept) == sorted(plan.kept, reverse=True)
    assert plan.kept[-1] >= plan.recent + min(parameters.min_context_length, context)
    interval = parameters.layerwise_downsample_interval
    cuts = [layer for layer in range(layers - 1) if plan.kept[layer + 1] < plan.kept[layer]]
    assert all(layer % interval == 0 for layer in cuts)


@pytest.mark.parametrize(("minimum", "deepest"), [(74, 76), (75, 101)])
def test_a_cut_leaves_more_than_the_minimum_context(minimum: int, deepest: int) -> None:
    # Layer 2 wants 75 of the 100 tokens behind the recent one.
    parameters = PyramidKnobs(0.0, 0.5, min_context_length=minimum, layerwise_downsample_interval=2)
    assert obeyed(parameters, 101, 4, "prune").kept == (101, 101, 101, deepest)


@given(knobs, st.integers(1, 4000), st.integers(1, 40))
def test_generated_chunks_keep_fewer_tokens_the_deeper_the_layer(
    parameters: PyramidKnobs, prompt_tokens: int, layers: int
) -> None:
    plan = obeyed(parameters, prompt_tokens, layers, "evict")
    rule = plan.generation
    assert rule is not None
    chunk = parameters.exceed_length_to_compress
    assert (rule.chunk, rule.window, rule.start) == (chunk, plan.recent, plan.kept)
    assert rule.keeps[0] == max(1, int(chunk * parameters.gen_compress_ratio))
    assert list(rule.keeps) == sorted(rule.keeps, reverse=True)
    least = int(chunk * parameters.gen_compress_ratio * parameters.gen_decay_ratio)
    assert rule.keeps[-1] >= max(1, least)
