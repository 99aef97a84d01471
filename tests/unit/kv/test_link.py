"""Copies come no sooner than their link allows, and nothing that is under way is overwritten."""

import time

import numpy as np
import pytest
import torch

from workers.kv import link as link_module
from workers.kv.host import HostStore
from workers.kv.link import Copy, MemoryLink, PacedLink


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


class LateReads(MemoryLink):
    """Copies to the device that the device alone waits for: host memory is read until somebody waits."""

    def __init__(self) -> None:
        self.reading: list[LateRead] = []

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Copy:
        destination.copy_(source)
        self.reading.append(LateRead())
        return self.reading[-1]


class LateRead:
    """A copy under way."""

    def __init__(self) -> None:
        self.waited = False

    def done(self) -> bool:
        return self.waited

    def wait(self) -> None:
        self.waited = True

    def wait_on_device(self) -> None:
        return


def test_the_host_moves_no_row_that_may_still_be_read() -> None:
    link, like = LateReads(), torch.zeros(1, 2, 1, 4)
    host = HostStore(1 << 20, link, sequences=2, layers=1, max_tokens=64, like=like)
    host.open("a")
    kv = torch.arange(20.0)[:, None, None, None].expand(20, 2, 1, 4).contiguous()
    host.spill("a", 0, [np.arange(20, dtype=np.int32)[None]], kv)
    host.read("a", 0)
    reads = [copy for copy in link.reading if not copy.waited]
    assert reads
    # Nothing comes in the place of tokens 3 and 5, so that others move there.
    host.exchange("a", 0, np.array([3, 5]), np.zeros((1, 0), dtype=np.int32), kv[:0])
    assert all(copy.waited for copy in reads)
    left = host.read("a", 0)
    assert left is not None
    assert sorted(left[:, 0, 0, 0].tolist()) == [n for n in range(20) if n not in (3, 5)]
    host.check_integrity()
