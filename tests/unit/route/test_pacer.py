"""When new output is told, on a clock of our own."""

from collections.abc import Callable

import pytest

from cluster.route.pacer import LONGEST_SPACING, MESSAGES_PER_SECOND, Pacer


class Stream:
    def __init__(self) -> None:
        self.times = 0

    def tell(self) -> None:
        self.times += 1


class Timers(list[tuple[float, Callable[[], None]]]):
    """A pacer for ``streams`` streams, its clock, and what it wants to be called for."""

    def __init__(self, streams: int = 10) -> None:
        self.now = 100.0
        self.pacer = Pacer(lambda: streams, lambda: self.now, lambda *timer: self.append(timer))

    def tell(self, *streams: Stream) -> list[int]:
        for each in streams:
            self.pacer.add(each)
        self.pacer.tell()
        return [each.times for each in streams]


def test_what_is_due_is_told_at_once_and_the_rest_together_later() -> None:
    timers, first, second = Timers(), Stream(), Stream()
    spacing = 10 / MESSAGES_PER_SECOND
    assert timers.tell(first, second) == [1, 1]
    timers.now += spacing / 4
    assert timers.tell(first) == [1]
    assert timers.tell(second, first) == [1, 1]
    ((delay, call),) = timers
    assert delay == pytest.approx(3 * spacing / 4)
    timers.now += delay
    call()
    assert (first.times, second.times) == (2, 2)
    timers.now += spacing
    assert timers.tell(first) == [3]
    assert len(timers) == 1


def test_nothing_to_tell_takes_no_time() -> None:
    timers = Timers()
    assert timers.tell() == []
    assert timers.tell(Stream()) == [1]
    assert not timers


def test_no_number_of_streams_makes_it_wait_longer_than_the_longest() -> None:
    timers = Timers(streams=10**6)
    timers.tell(Stream())
    timers.tell(Stream())
    ((delay, _),) = timers
    assert delay == LONGEST_SPACING
