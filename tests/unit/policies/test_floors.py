"""What floors keep of instructions: their best, whatever scores better elsewhere."""

import math

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.budget.span import Span
from workers.policies.floors import MOST, Floors
from workers.policies.observed import Observed, best, ends
from workers.policies.registry import BUILT_IN, plan, says_how_much, span_floor
from workers.policies.valid import validate

CPU = torch.device("cpu")


def expected(
    positions: list[int],
    rank: list[int],
    spans: list[Span],
    share: float,
    fixed: tuple[int, int],
    keep: int,
) -> list[int]:
    """Ten plain lines; ``fixed``: sinks and recent."""
    sinks, recent = fixed
    tokens = range(len(positions))
    stays = {*tokens[: min(sinks, keep - recent)], *tokens[len(tokens) - recent :]}
    room = int(MOST * (keep - len(stays)))
    lacks, free = [], []
    for span in spans:
        own = [token for token in tokens if span.first <= positions[token] < span.end]
        free.append(sorted(set(own) - stays, key=lambda token: -rank[token]))
        lacks.append(min(len(free[-1]), max(0, math.ceil(share * span.tokens) - len(stays & set(own)))))
    fitted = [lack if sum(lacks) <= room else lack * room // sum(lacks) for lack in lacks]
    for own, lack in zip(free, fitted, strict=True):
        stays |= set(own[:lack])
    others = sorted(set(tokens) - stays, key=lambda token: -rank[token])
    return sorted([*stays, *others[: keep - len(stays)]])


@settings(max_examples=examples(300))
@given(st.data(), st.integers(1, 3), st.integers(1, 2))
def test_each_span_keeps_its_best_and_the_rest_goes_by_score(
    data: st.DataObject, sets: int, layers: int
) -> None:
    length = data.draw(st.integers(2, 60))
    tokens = data.draw(st.integers(1, length))
    keep = data.draw(st.integers(1, tokens))
    recent = data.draw(st.integers(0, keep))
    sinks = data.draw(st.integers(0, tokens - recent))
    cuts = sorted(data.draw(st.sets(st.integers(0, length), min_size=2, max_size=6)))
    spans = [Span(*ends) for ends in zip(cuts[::2], cuts[1::2], strict=False)]
    share = data.draw(st.floats(0.01, 1))
    choices = layers * sets
    held = [sorted(data.draw(st.permutations(range(length)))[:tokens]) for _ in range(choices)]
    ranks = [data.draw(st.permutations(range(tokens))) for _ in range(choices)]
    positions = np.array(held, np.int32).reshape(layers, sets, tokens)
    scores = torch.tensor(ranks, dtype=torch.float32).view(layers, sets, tokens)
    floors = Floors.among(positions, spans, share, CPU)
    chosen = best(Observed(sinks, recent, "each", CPU, floors=floors), scores, keep)
    for own, where, rank in zip(chosen.flatten(0, 1).tolist(), held, ranks, strict=True):
        assert own == expected(where, rank, spans, share, (sinks, recent), keep)
    assert scores.flatten(0, 1).tolist() == ranks


@given(st.data())
def test_one_choice_serves_sets_that_hold_other_tokens_each_with_its_own_floors(
    data: st.DataObject,
) -> None:
    held = [sorted(data.draw(st.permutations(range(20)))[:12]) for _ in range(2)]
    rank = data.draw(st.permutations(range(12)))
    floors = Floors.among(np.array(held, np.int32), [Span(3, 9)], 0.7, CPU)
    scores = torch.tensor([rank], dtype=torch.float32)
    chosen = best(Observed(1, 2, "each", CPU, floors=floors), scores, 9)
    assert chosen.tolist() == [expected(own, rank, [Span(3, 9)], 0.7, (1, 2), 9) for own in held]


def test_without_instructions_or_a_share_of_them_there_are_no_floors() -> None:
    positions = np.arange(5, dtype=np.int32)[None]
    assert Floors.among(positions, [], 0.5, CPU) is None
    assert Floors.among(positions, [Span(0, 3)], 0.0, CPU) is None


def test_floors_take_no_more_than_half_of_what_is_left_to_choose() -> None:
    floors = Floors.among(np.arange(100, dtype=np.int32)[None], [Span(0, 60), Span(60, 90)], 1.0, CPU)
    newer_is_better = torch.arange(100.0)[None]
    chosen = best(Observed(4, 10, "mean", CPU, floors=floors), newer_is_better, 34)[0]
    # Of 20 that are left 10 are the spans', as they lack 56 and 30; then the newest stay.
    first, second = [*range(54, 60)], [*range(87, 90)]
    assert chosen.tolist() == [*range(4), *first, *range(76, 87), *second, *range(90, 100)]


@pytest.mark.parametrize("floor", [-0.1, 1.01, True, "all", (0.5,), float("nan")])
def test_a_floor_that_is_no_share_is_refused_by_name(floor: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"span_floor is .*; it must be a number in \[0, 1\]"):
        validate(Compression("snapkv", kv_keep=0.5, parameters={"span_floor": floor}))


@pytest.mark.parametrize("name", ["full", "streaming", "local"])
def test_a_policy_that_looks_at_nothing_has_no_floors(name: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=f"span_floor is 0.5, but policy '{name}' looks at nothing"
    ):
        validate(Compression(name, parameters={"span_floor": 0.5}))
    validate(Compression(name, parameters={"span_floor": 0}))


@pytest.mark.parametrize("name", [each.name for each in BUILT_IN if each.choose is not ends])
def test_a_floor_is_a_parameter_of_every_policy_that_scores_and_changes_no_counts(name: str) -> None:
    plain, floored = (
        Compression(name, kv_keep=0.3, parameters={"span_floor": floor}) for floor in (0, 0.5)
    )
    validate(floored)
    assert span_floor(floored) == 0.5
    assert span_floor(Compression(name)) == 0
    assert plan(floored, 500, 6) == plan(plain, 500, 6) == plan(Compression(name, kv_keep=0.3), 500, 6)
    assert not says_how_much(Compression(name, parameters={"span_floor": 0.5}))
