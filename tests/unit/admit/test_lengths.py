"""How long replies are expected to become."""

from dataclasses import replace

import pytest
from fake_head import request

from cluster.admit.lengths import LEAST, REMEMBERED, OutputLengths
from cluster.admit.tuning import AdmitTuning
from pyramidserve.types import Stopping
from workers.schedule.validation import EXPECTED_TOKENS

SHARE = AdmitTuning().length_share
ASKED = replace(request(), stopping=Stopping(max_tokens=100))


def test_nothing_is_concluded_from_a_few_replies() -> None:
    lengths = OutputLengths(SHARE)
    for _ in range(LEAST - 1):
        lengths.count(ASKED, 10)
    assert lengths.expected(ASKED) == 100
    lengths.count(ASKED, 10)
    assert lengths.expected(ASKED) == 16


def test_what_nobody_has_limited_is_not_expected_to_fill_the_context() -> None:
    lengths = OutputLengths(SHARE)
    unlimited = replace(ASKED, stopping=Stopping(max_tokens=8000), limited=False)
    assert lengths.expected(unlimited) == EXPECTED_TOKENS
    assert lengths.expected(replace(unlimited, stopping=Stopping(max_tokens=40))) == 40
    for _ in range(LEAST):
        lengths.count(unlimited, 700)
    assert lengths.expected(unlimited) == 704


@pytest.mark.parametrize(("share", "expected"), [(SHARE, 80), (0.25, 32)])
def test_so_many_are_no_longer_than_expected_in_whole_pages(share: float, expected: int) -> None:
    lengths = OutputLengths(share)
    for tokens in range(1, 101):
        lengths.count(ASKED, tokens)
    assert lengths.expected(replace(ASKED, stopping=Stopping(max_tokens=1000))) == expected


def test_old_replies_are_forgotten() -> None:
    lengths = OutputLengths(SHARE)
    for tokens in [90] * REMEMBERED + [16] * REMEMBERED:
        lengths.count(ASKED, tokens)
    assert lengths.expected(ASKED) == 16


def test_the_limit_and_what_there_is_already_bound_it() -> None:
    lengths = OutputLengths(SHARE)
    for _ in range(LEAST):
        lengths.count(ASKED, 50)
    assert lengths.expected(replace(ASKED, stopping=Stopping(max_tokens=20))) == 20
    assert lengths.expected(replace(ASKED, resume_output_ids=(1,) * 70)) == 71


def test_a_reply_that_cannot_end_by_itself_runs_to_its_limit_and_teaches_nothing() -> None:
    forever = replace(ASKED, stopping=Stopping(max_tokens=100, ignore_eos=True))
    lengths = OutputLengths(SHARE)
    for _ in range(LEAST):
        lengths.count(forever, 100)
    assert lengths.expected(ASKED) == 100
    for _ in range(LEAST):
        lengths.count(ASKED, 10)
    assert lengths.expected(forever) == 100
