"""The order in which requests wait."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from fake_head import request
from hypothesis import given
from hypothesis import strategies as st

from cluster.admit.queue import HEAD_START, Queue, cost
from cluster.admit.request import ValidatedRequest
from pyramidserve.types import Priority, Stopping


@dataclass(frozen=True)
class Waiting:
    request: ValidatedRequest
    arrived: float
    tenant: str = ""


def waiting(
    name: str, arrived: float, tenant: str = "", priority: Priority = "normal", tokens: int = 16
) -> Waiting:
    asked = replace(request(name), priority=priority, stopping=Stopping(max_tokens=tokens))
    return Waiting(asked, arrived, tenant)


def names(queue: Queue[Waiting]) -> list[str]:
    return [each.request.request_id for each in queue]


def test_one_tenants_requests_go_in_order_of_arrival() -> None:
    queue: Queue[Waiting] = Queue({})
    for name, arrived in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        queue.add(waiting(name, arrived))
    assert names(queue) == ["a", "b", "c"]
    assert len(queue) == 3


def test_a_priority_is_a_head_start_and_no_more() -> None:
    queue: Queue[Waiting] = Queue({})
    queue.add(waiting("low", 0.0, priority="low"))
    queue.add(waiting("normal", 10.0))
    queue.add(waiting("high", 20.0, priority="high"))
    assert names(queue) == ["high", "normal", "low"]
    most = HEAD_START["high"] - HEAD_START["low"]
    queue.add(waiting("too late", most + 0.1, priority="high"))
    assert names(queue) == ["high", "normal", "low", "too late"]


@given(
    st.lists(
        st.tuples(st.floats(0, 200), st.sampled_from(["high", "normal", "low"])), min_size=1, max_size=30
    )
)
def test_nobody_is_overtaken_by_what_comes_more_than_a_minute_later(
    wanted: list[tuple[float, Literal["high", "normal", "low"]]],
) -> None:
    queue: Queue[Waiting] = Queue({})
    for number, (arrived, priority) in enumerate(wanted):
        queue.add(waiting(str(number), arrived, priority=priority))
    latest = 0.0
    for item in queue:
        latest = max(latest, item.arrived)
        assert latest - item.arrived <= HEAD_START["high"] - HEAD_START["low"] + 1e-9


@pytest.mark.parametrize(("weights", "shares"), [({}, (1, 1)), ({"a": 3.0}, (3, 1))])
def test_tenants_are_served_by_their_weights_however_much_they_ask_for(
    weights: dict[str, float], shares: tuple[int, int]
) -> None:
    queue: Queue[Waiting] = Queue(weights)
    for number in range(100):
        queue.add(waiting(f"a{number}", number, "a"))
    for number in range(40):
        queue.add(waiting(f"b{number}", 1000.0 + number, "b", tokens=33))  # twice as much each
    served: Counter[str] = Counter()
    for _ in range(60):
        item = next(iter(queue))
        queue.serve(item)
        served[item.tenant] += round(cost(item.request))
    assert served["a"] / served["b"] == pytest.approx(shares[0] / shares[1], rel=0.1)


def test_the_order_shown_is_the_order_served() -> None:
    queue: Queue[Waiting] = Queue({"b": 2.0})
    for number in range(9):
        queue.add(waiting(f"{'abc'[number % 3]}{number}", number, "abc"[number % 3], tokens=5 + number))
    shown, served = names(queue), []
    while queue:
        item = next(iter(queue))
        queue.serve(item)
        served.append(item.request.request_id)
    assert served == shown


def test_a_tenant_is_not_owed_what_it_did_not_ask_for() -> None:
    queue: Queue[Waiting] = Queue({})
    for number in range(50):
        queue.add(waiting(f"a{number}", number, "a"))
        queue.serve(next(iter(queue)))
    for number in range(4):
        queue.add(waiting(f"a{number}", 100 + number, "a"))
        queue.add(waiting(f"b{number}", 200 + number, "b"))
    assert {name[0] for name in names(queue)[:2]} == {"a", "b"}
    assert {name[0] for name in names(queue)[2:4]} == {"a", "b"}


def test_what_is_removed_is_gone_once() -> None:
    queue: Queue[Waiting] = Queue({})
    first, second = waiting("a", 1.0), waiting("b", 2.0)
    for item in (first, second):
        queue.add(item)
    assert first in queue
    assert queue.remove(first)
    assert not queue.remove(first)
    assert first not in queue
    assert names(queue) == ["b"]
    assert len(queue) == 1
