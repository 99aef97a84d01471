"""How fast requests end, on a clock of our own."""

import pytest

from cluster.admit.pace import COMPLETIONS, RETRY_DELAY_RANGE, UNKNOWN_RETRY_DELAY, Pace


class Clocked:
    """A pace and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = Pace(lambda: self.now)

    def end(self, *moments: float, token_seconds: float = 1.0) -> None:
        for self.now in moments:
            self.pace.count(token_seconds)


def test_the_retry_delay_is_the_time_that_the_queue_takes_to_drain() -> None:
    clocked = Clocked()
    clocked.end(10.0, 12.0, 14.0)
    assert clocked.pace.retry_delay(4) == pytest.approx(4 * 2.0)
    clocked.now = 16.0
    assert clocked.pace.retry_delay(4) == pytest.approx(4 * 3.0)
    clocked.now = 1e6
    assert clocked.pace.retry_delay(4) == 30.0
    assert clocked.pace.retry_delay(0) == RETRY_DELAY_RANGE[0]


def test_the_retry_delay_forgets_what_is_long_past() -> None:
    clocked = Clocked()
    clocked.end(0.0, *(1e6 + step for step in range(COMPLETIONS)))
    assert clocked.pace.retry_delay(1) == pytest.approx(1.0)


def test_one_completion_tells_no_rate() -> None:
    clocked = Clocked()
    clocked.end(5.0)
    clocked.now = 9.0
    assert clocked.pace.retry_delay(4) == UNKNOWN_RETRY_DELAY
    assert clocked.pace.drain_seconds(4) == 0.0


def test_a_deadline_is_too_soon_when_queue_and_output_would_take_longer() -> None:
    clocked = Clocked()
    clocked.end(0.0, 2.0, token_seconds=0.5)
    assert clocked.pace.too_late(2.0 + 3 * 2.0 + 8.1, 16, waiting=3) is None
    error = clocked.pace.too_late(2.0 + 3 * 2.0 + 7.9, 16, waiting=3)
    assert error is not None
    assert error.reason == "deadline_unreachable"
    assert "in 13.9 s, and 16 output tokens would take about 14.0 s, of these 6.0 s" in error.message


def test_replies_of_one_token_tell_no_time_between_tokens() -> None:
    clocked = Clocked()
    clocked.end(0.0, 2.0, token_seconds=0.0)
    assert clocked.pace.too_late(2.1, 10**6, waiting=0) is None
