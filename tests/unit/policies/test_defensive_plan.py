"""The counts of `defensive`: what is asked for, in both ways to prefill, with room to choose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.budget.observation import RowAttention
from workers.budget.plan import GenerationPlan
from workers.policies.capacity import CHUNK
from workers.policies.defensive import SINKS
from workers.policies.registry import plan
from workers.policies.valid import validate

prompts, layers, shares = st.integers(1, 5000), st.integers(1, 40), st.floats(0.05, 1)


@given(prompts, layers, shares)
def test_layers_keep_the_same_where_all_are_computed(prompt: int, count: int, share: float) -> None:
    keep = plan(Compression("defensive", "evict", share), prompt, count)
    least = min(prompt, SINKS + 1)
    assert set(keep.kept) == {max(least, max(1, int(prompt * share)))}
    assert keep.heads == "each"
    assert 1 <= keep.recent <= max(1, min(keep.kept) // 2)


@given(prompts, layers, shares)
def test_what_prunes_has_all_in_its_first_layer_and_the_same_in_all_others(
    prompt: int, count: int, share: float
) -> None:
    keep = plan(Compression("defensive", "prune", share), prompt, count)
    assert keep.drops_hidden_states
    assert keep.heads == "mean"
    assert keep.kept[0] == prompt
    assert len(set(keep.kept[1:])) <= 1
    whole = sum(keep.kept)
    assert whole <= max(prompt * count * share, prompt + (count - 1) * (SINKS + 1))
    assert (keep.bound_by == "sinks") == (whole > count * max(1, int(prompt * share)))


def test_generated_tokens_that_leave_the_window_are_cut_to_the_layers_share() -> None:
    keep = plan(Compression("defensive", kv_keep=0.25, parameters={"layer_budget": [1, 3]}), 1000, 2)
    assert keep.generation == GenerationPlan(
        CHUNK, 200, start=(125, 375), keeps=(2, 6), observes=RowAttention(rows=200)
    )
    assert keep.observes == RowAttention(rows=200, over_rows="max")


def test_heads_keep_tokens_of_their_own_unless_hidden_states_are_dropped() -> None:
    validate(Compression("defensive", "prune", 0.4))
    with pytest.raises(InvalidRequestError, match="heads is 'each', which prefill 'prune' cannot have"):
        validate(Compression("defensive", "prune", 0.4, parameters={"heads": "each"}))
    assert plan(Compression("defensive", kv_keep=0.4, parameters={"heads": "all"}), 100, 2).heads == "mean"


def test_the_most_that_a_row_pays_is_not_gathered_while_tokens_are_generated() -> None:
    with pytest.raises(ValueError, match="'max' while tokens are generated"):
        GenerationPlan(16, 1, (1,), (1,), observes=RowAttention(1, over_rows="max"))
