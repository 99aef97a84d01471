"""What a layer keeps: the recent, the sinks, and what attention asks for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.policies.select import complement, keep_of_prompt

CPU = torch.device("cpu")


@given(st.data())
def test_the_best_scored_are_kept_beside_sinks_and_recent(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    recent = data.draw(st.integers(1, tokens))
    sinks = data.draw(st.integers(0, tokens - recent))
    kept = data.draw(st.integers(recent + sinks, tokens))
    ranks = data.draw(st.permutations(range(tokens - recent)))
    chosen = keep_of_prompt(
        torch.tensor(ranks, dtype=torch.float32), tokens, kept, recent, sinks, CPU
    ).tolist()
    middle = sorted(range(sinks, tokens - recent), key=lambda token: -ranks[token])
    expected = [*range(sinks), *middle[: kept - recent - sinks], *range(tokens - recent, tokens)]
    assert chosen == sorted(expected)


@given(st.data())
def test_without_scores_the_oldest_and_the_recent_are_kept(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, tokens))
    recent = data.draw(st.integers(1, kept))
    chosen = keep_of_prompt(None, tokens, kept, recent, kept - recent, CPU)
    assert chosen.tolist() == [*range(kept - recent), *range(tokens - recent, tokens)]
    assert chosen.dtype == torch.int64


@given(st.lists(st.booleans(), max_size=40))
def test_the_complement_is_what_is_left_in_order(stays: list[bool]) -> None:
    chosen = torch.tensor([index for index, stay in enumerate(stays) if stay], dtype=torch.int64)
    left = complement(chosen, len(stays))
    assert left.tolist() == [index for index, stay in enumerate(stays) if not stay]
    assert left.dtype == torch.int64
