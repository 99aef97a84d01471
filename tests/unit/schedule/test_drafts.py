"""As many tokens are drafted as it pays, for how many have been right."""

import pytest

from workers.policies.registry import DRAFTS
from workers.schedule.drafts import Drafting
from workers.schedule.tuning import ScheduleTuning


def settled(rounds: int, right: int, tuning: ScheduleTuning = ScheduleTuning()) -> Drafting:
    """After so many rounds of verification, in each of which at most ``right`` drafts are right."""
    drafting = Drafting(DRAFTS, tuning)
    for _ in range(rounds):
        ahead = drafting.ahead
        drafting.verified(ahead, min(ahead, right))
    return drafting


def test_drafts_that_are_always_right_are_as_many_as_may_be() -> None:
    assert settled(30, DRAFTS).ahead == DRAFTS


def test_drafts_that_are_always_wrong_are_few_and_never_none() -> None:
    assert settled(60, 0).ahead == 1


def test_the_worse_drafts_are_the_fewer_there_are() -> None:
    means = [
        sum(settled(rounds, right).ahead for rounds in range(40, 60)) / 20 for right in range(DRAFTS + 1)
    ]
    assert means == sorted(means)
    assert means[-1] - means[0] > 5


def test_it_recovers_when_drafts_become_right_again() -> None:
    drafting = settled(60, 0)
    for _ in range(60):
        drafting.verified(drafting.ahead, drafting.ahead)
    assert drafting.ahead == DRAFTS


def test_the_dearer_a_verification_the_more_is_drafted_for_each() -> None:
    ahead = [settled(60, 3, ScheduleTuning(verification_steps=steps)).ahead for steps in (0.5, 2.0, 20.0)]
    assert ahead == sorted(set(ahead))


def test_the_more_the_newest_verification_counts_the_sooner_it_adapts() -> None:
    fast, slow = (settled(3, 0, ScheduleTuning(newest_verification=share)) for share in (0.2, 0.01))
    assert fast.ahead < slow.ahead


def test_what_was_drafted_and_accepted_is_counted() -> None:
    drafting = Drafting(4)
    drafting.verified(4, 4)
    drafting.verified(3, 1)
    assert (drafting.drafted, drafting.accepted) == (7, 5)


@pytest.mark.parametrize("most", [1, 3, DRAFTS])
def test_there_are_never_more_than_may_be(most: int) -> None:
    assert Drafting(most).ahead <= most
