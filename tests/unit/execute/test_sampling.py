"""A draw is a function of logits, seed and output index, and follows the distribution asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyramidserve.types import Sampling
from workers.execute.sampling import sample, uniform
from workers.schedule.step import NO_TOKEN

DRAWS = 4000
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.4, -2.0, 0.0, 0.9])
# The 0.9999 quantile of chi-square by degrees of freedom; draws are fixed, so this cannot flicker.
CHI_SQUARE = {0: 0.0, 1: 15.14, 2: 18.42, 3: 21.11, 7: 29.88}


def draws(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[int]:
    return sample(logits.expand(DRAWS, -1), [sampling] * DRAWS, range(DRAWS))


def check_distribution(tokens: list[int], expected: torch.Tensor) -> None:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    allowed = expected > 0
    assert not counts[~allowed].any()
    wanted = expected[allowed].double() * DRAWS
    distance = ((counts[allowed] - wanted) ** 2 / wanted).sum().item()
    assert distance <= CHI_SQUARE[int(allowed.sum()) - 1]


def nucleus(probabilities: torch.Tensor, allowed: list[int]) -> torch.Tensor:
    """The distribution that is left of ``probabilities`` on ``allowed`` tokens."""
    left = torch.zeros_like(probabilities)
    left[allowed] = probabilities[allowed]
    return left / left.sum()


def test_no_temperature_takes_the_most_likely_token() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    greedy = sample(logits, [Sampling(top_p=0.1, top_k=3)] * 20, [0] * 20)
    assert greedy == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    tokens = draws(Sampling(temperature, seed=11))
    check_distribution(tokens, (LOGITS / temperature).softmax(dim=0))


def test_draws_of_one_index_follow_the_softmax_over_seeds() -> None:
    samplings = [Sampling(1.0, seed=seed) for seed in range(DRAWS)]
    check_distribution(sample(LOGITS.expand(DRAWS, -1), samplings, [5] * DRAWS), LOGITS.softmax(dim=0))


def test_top_k_keeps_the_k_most_likely() -> None:
    expected = nucleus(LOGITS.softmax(dim=0), [2, 4, 0, 7])
    check_distribution(draws(Sampling(1.0, top_k=4, seed=3)), expected)
    assert set(draws(Sampling(1.0, top_k=1, seed=3))) == {2}
    check_distribution(draws(Sampling(1.0, top_k=99, seed=3)), LOGITS.softmax(dim=0))


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 2]), (0.95, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: list[int]) -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    tokens = draws(Sampling(1.0, top_p=top_p, seed=9), probabilities.log())
    check_distribution(tokens, nucleus(probabilities, allowed))


def test_top_p_counts_within_top_k() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two best, 0.4 is 0.57: enough for 0.5, too little for 0.6.
    assert set(draws(Sampling(1.0, 0.5, 2, seed=1), logits)) == {0}
    assert set(draws(Sampling(1.0, 0.6, 2, seed=1), logits)) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert set(draws(Sampling(temperature, seed=2))) == {2}
    assert set(draws(Sampling(temperature, top_p=0.9, top_k=3, seed=2))) == {2}


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.lists(st.integers(0, 2**63 - 1), max_size=4))
def test_a_draw_does_not_depend_on_what_shares_its_batch(seed: int, index: int, others: list[int]) -> None:
    own = Sampling(1.5, seed=seed)
    (alone,) = sample(LOGITS[None], [own], [index])
    crowd = [Sampling(0.7, 0.8, 3, other) for other in others]
    logits = torch.cat((torch.randn(len(others), len(LOGITS)), LOGITS[None]))
    assert sample(logits, [*crowd, own], [*range(len(others)), index])[-1] == alone


def test_points_are_in_range_and_of_their_own_for_each_seed_and_index() -> None:
    seeds = (0, 1, 2**63 - 1, -1, -(2**63))
    points = [uniform(seed, index) for seed in seeds for index in range(200)]
    assert all(0 <= point < 1 for point in points)
    assert len(set(points)) == len(points)
    assert uniform(1, 2) == uniform(1, 2)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, seed=3), Sampling(1.0, 0.9, 4, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_drawn_from_what_is_not_finite(bad: float, sampling: Sampling) -> None:
    logits = LOGITS.repeat(4, 1)
    logits[1, 3] = bad
    logits[2] = float("-inf")
    drawn = sample(logits, [sampling] * 4, [0] * 4)
    assert [token == NO_TOKEN for token in drawn] == [False, True, True, False]
    assert drawn[0] == drawn[3] == sample(LOGITS[None], [sampling], [0])[0]
