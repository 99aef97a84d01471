"""When new output is told, on a clock of our own."""

import os
from collections.abc import Callable

import pytest

from cluster.route.pacer import Pacer
from cluster.route.tuning import RouteTuning

TUNING = RouteTuning()


class Stream:
    def __init__(self) -> None:
        self.times = 0

    def tell(self) -> None:
        self.times += 1


class Timers(list[tuple[float, Callable[[], None]]]):
    """A pacer for ``streams`` streams, its clock, and what it wants to be called for."""

    def __init__(self, streams: int = 10, tuning: RouteTuning = TUNING) -> None:
        self.now = 100.0
        self.pacer = Pacer(lambda: streams, lambda: self.now, lambda *timer: self.append(timer), tuning)

    def tell(self, *streams: Stream) -> list[int]:
        for each in streams:
            self.pacer.add(each)
        self.pacer.tell()
        return [each.times for each in streams]


@pytest.mark.parametrize("messages", [TUNING.messages_per_core, 1000.0])
def test_what_is_due_is_told_at_once_and_the_rest_together_later(messages: float) -> None:
    timers, first, second = Timers(tuning=RouteTuning(messages_per_core=messages)), Stream(), Stream()
    spacing = 10 / messages / (os.cpu_count() or 1)
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


@pytest.mark.parametrize("longest", [TUNING.longest_spacing, 0.5])
def test_no_number_of_streams_makes_it_wait_longer_than_the_longest(longest: float) -> None:
    timers = Timers(10**6, RouteTuning(longest_spacing=longest))
    timers.tell(Stream())
    timers.tell(Stream())
    ((delay, _),) = timers
    assert delay == longest
