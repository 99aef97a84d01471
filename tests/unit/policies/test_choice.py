"""What is chosen: what stays in any case, and what scores best; and what a policy does wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.execute.choice import Chooser
from workers.policies.observed import Observed, best, ends

CPU = torch.device("cpu")


@given(st.data(), st.integers(1, 3))
def test_the_best_scored_are_kept_beside_sinks_and_recent(data: st.DataObject, sets: int) -> None:
    tokens = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, tokens))
    recent = data.draw(st.integers(0, kept))
    sinks = data.draw(st.integers(0, tokens - recent))
    ranks = [data.draw(st.permutations(range(tokens))) for _ in range(sets)]
    scores = torch.tensor(ranks, dtype=torch.float32)
    chosen = best(Observed(sinks, recent, "each", CPU), scores, kept)
    assert chosen.dtype == torch.int64
    sinks = min(sinks, kept - recent)
    for own, rank in zip(chosen.tolist(), ranks, strict=True):
        middle = sorted(range(sinks, tokens - recent), key=lambda token: -rank[token])
        expected = [*range(sinks), *middle[: kept - recent - sinks], *range(tokens - recent, tokens)]
        assert own == sorted(expected)


def test_of_equals_the_older_stays() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0]])
    assert best(Observed(0, 0, "mean", CPU), scores, 3).tolist() == [[0, 1, 4]]


@given(st.data())
def test_the_ends_are_the_first_and_the_newest(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, tokens))
    sinks = data.draw(st.integers(0, kept))
    recent = data.draw(st.integers(0, kept - sinks))
    chosen = ends(Observed(sinks, recent, "mean", CPU), tokens, kept, None)
    assert chosen.tolist() == [[*range(sinks), *range(tokens - kept + sinks, tokens)]]


def fails(observed: Observed, tokens: int, keep: int) -> torch.Tensor:
    raise ZeroDivisionError("no denominator")


WRONG: list[tuple[Callable[..., Any], str]] = [
    (fails, "ZeroDivisionError: no denominator"),
    (lambda *_: torch.arange(3)[None], "it chose 3 tokens of 8 where 4 stay"),
    (lambda *_: torch.tensor([[0, 2, 2, 3]]), "do not ascend from 0 to 7"),
    (lambda *_: torch.tensor([[0, 2, 4, 8]]), "do not ascend from 0 to 7"),
    (lambda *_: torch.tensor([[-1, 2, 4, 5]]), "do not ascend from 0 to 7"),
    (lambda *_: torch.arange(4).expand(3, -1), "RuntimeError"),
    (lambda *_: [0, 1, 2, 3], "AttributeError"),
]


@pytest.mark.parametrize(("choose", "why"), WRONG)
def test_what_a_policy_does_wrong_is_told_and_the_ends_stay(choose: Callable[..., Any], why: str) -> None:
    chooser = Chooser(7, choose)
    observed = Observed(1, 0, "each", CPU)
    assert chooser(observed, (2,), 8, 4).tolist() == [[0, 5, 6, 7]] * 2
    assert why in chooser.failure
    told = chooser.failure
    assert chooser(observed, (5, 2), 9, 2).shape == (5, 2, 2)
    assert chooser.failure == told


def test_one_set_serves_all_where_a_policy_has_one() -> None:
    chooser = Chooser(7, lambda observed, tokens, keep: torch.arange(keep)[None])
    assert chooser(Observed(0, 0, "each", CPU), (3,), 8, 2).tolist() == [[0, 1]] * 3
    assert chooser.failure == ""
