"""A paced link brings what it is asked for, no sooner than its bandwidth and latency allow."""

import time

import pytest
import torch

from workers.kv import link as link_module
from workers.kv.link import PacedLink


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(link_module, "time", own)
    return own


def test_copies_wait_for_each_other_and_for_the_way(clock: Clock) -> None:
    link = PacedLink(bytes_per_second=1000, latency=0.5)
    source, first, second = torch.arange(50.0), torch.zeros(50), torch.zeros(50)
    early, late = link.start(first, source), link.start(second, source)
    assert not early.done()
    early.wait()
    assert clock.now == pytest.approx(0.2 + 0.5)
    assert torch.equal(first, source)
    late.wait()
    assert clock.now == pytest.approx(0.4 + 0.5)
    assert late.done()
    assert link.moved == 400


def test_an_idle_link_does_not_save_up(clock: Clock) -> None:
    link = PacedLink(bytes_per_second=1000, latency=0)
    clock.now = 10
    link.read(100).wait()
    assert clock.now == pytest.approx(10.1)


def test_what_it_takes_is_real_time() -> None:
    began = time.perf_counter()
    PacedLink(bytes_per_second=1e6, latency=0.01).read(20_000).wait()
    assert time.perf_counter() - began >= 0.03
