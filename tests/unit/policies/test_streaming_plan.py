"""Streaming keeps the first tokens and a window of the latest, in the prompt and behind it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.budget.plan import KeepPlan
from workers.policies.capacity import CHUNK
from workers.policies.policy import Target
from workers.policies.streaming import StreamingKnobs, plan_streaming

lengths = st.integers(1, 200)


def cached(plan: KeepPlan, generated: int) -> list[int]:
    """Positions that the last layer holds once ``generated`` tokens have passed."""
    rule = plan.generation
    assert rule is not None
    slots = [*range(plan.sinks), *range(plan.prompt_tokens - plan.recent, plan.prompt_tokens)]
    for step in range(generated):
        slots.append(plan.prompt_tokens + step)
        if rule.chunks(step + 1) > rule.chunks(step):
            del slots[rule.sinks : rule.sinks + rule.chunk]
    return slots


@given(st.integers(0, 8), st.integers(1, 60), lengths, lengths)
def test_sinks_and_window_stay_and_little_else(
    sinks: int, window: int, prompt_tokens: int, generated: int
) -> None:
    plan = plan_streaming(Target(prompt_tokens, 3), StreamingKnobs(sinks, window))
    held, seen = cached(plan, generated), list(range(prompt_tokens + generated))
    assert len(held) == plan.tokens(2, generated)
    assert held[:sinks] == seen[:sinks]
    assert held[-window:] == seen[-window:] or len(seen) < sinks + window
    assert len(held) >= min(len(seen), sinks + window)
    assert len(held) < sinks + window + CHUNK
    assert not plan.generation or not plan.generation.accumulates


@given(st.floats(0.01, 1), st.integers(1, 5000))
def test_a_kept_fraction_sets_sinks_and_window_together(kv_keep: float, prompt_tokens: int) -> None:
    plan = plan_streaming(Target(prompt_tokens, 3, kv_keep), StreamingKnobs())
    assert len(set(plan.kept)) == 1
    assert plan.kept[0] == plan.sinks + plan.recent
    if plan.bound_by:
        assert plan.bound_by == "sinks"
        assert plan.kept[0] == min(5, prompt_tokens)
        assert plan.fraction > kv_keep
    else:
        assert plan.kept[0] == max(1, int(kv_keep * prompt_tokens))


@pytest.mark.parametrize("prompt_tokens", [1, 2, 4])
def test_generated_tokens_are_sinks_where_the_prompt_is_too_short(prompt_tokens: int) -> None:
    plan = plan_streaming(Target(prompt_tokens, 3), StreamingKnobs(sinks=4, window=8))
    assert cached(plan, 100)[:4] == [0, 1, 2, 3]
