"""Who runs next, and where."""

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from fake_head import hello, request
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.admit.admission import Admission, Admitted
from cluster.admit.ledger import PipelineLedger
from cluster.admit.placement import Placement
from cluster.admit.request import ValidatedRequest
from cluster.admit.sessions import Sessions
from cluster.admit.tuning import AdmitTuning
from pyramidserve.errors import OverloadedError, RequestTimeoutError, RequestTooLargeError
from pyramidserve.types import Priority
from pyramidserve.wire import stage_state_from_message

PATIENCE, LOOKAHEAD = AdmitTuning().patience, AdmitTuning().lookahead


@dataclass(frozen=True, eq=False)
class Waiting:
    request: ValidatedRequest
    arrived: float
    tenant: str = ""
    deadline: float = math.inf


class Desk:
    """An admission with a clock, sessions, and items that arrive a second after each other."""

    def __init__(
        self, limit: int = 8, tuning: AdmitTuning = AdmitTuning(), weights: Mapping[str, float] = {}
    ) -> None:
        self.now = 0.0
        self.arrivals = 0
        self.admission: Admission[Waiting] = Admission(limit, weights, lambda: self.now, tuning)
        self.sessions = Sessions(8, 60, lambda: 0.0)
        self.placement = Placement(tuning)

    def enqueue(
        self,
        name: str,
        pages: int,
        *ledgers: PipelineLedger,
        session_id: str = "",
        deadline: float = math.inf,
        priority: Priority = "normal",
        tenant: str = "",
    ) -> Waiting:
        self.arrivals += 1
        asked = replace(request(name, pages, session_id=session_id), priority=priority)
        item = Waiting(asked, self.arrivals, tenant, deadline)
        self.admission.enqueue(item, ledgers)
        return item

    def choose(self, *ledgers: PipelineLedger) -> list[tuple[str, str]]:
        """The chosen: request and pipeline."""
        chosen = self.admitted(*ledgers)
        return [(each.item.request.request_id, each.pipeline_id) for each in chosen]

    def admitted(self, *ledgers: PipelineLedger) -> list[Admitted[Waiting]]:
        """What is admitted after something may have ended on all ``ledgers``."""
        for each in ledgers:
            self.placement.gained(each)
        return self.admission.choose(self.placement, self.sessions)


def ledger(pipeline_id: str = "p", pages: int = 8, max_sequences: int = 8) -> PipelineLedger:
    stages = [stage_state_from_message(stage) for stage in hello(pages=(pages,)).stages]
    return PipelineLedger(pipeline_id, stages, max_sequences)


def test_free_pages_are_filled_in_order_of_arrival() -> None:
    desk, books = Desk(), ledger(pages=5)
    for name, pages in (("a", 2), ("b", 3), ("c", 1)):
        desk.enqueue(name, pages, books)
    assert desk.choose(books) == [("a", "p"), ("b", "p")]
    assert books.free == (0,)
    assert len(desk.admission) == 1


def test_smaller_ones_fill_what_one_that_does_not_fit_leaves() -> None:
    desk, books = Desk(), ledger(pages=5)
    for name, pages in (("a", 3), ("b", 3), ("c", 1), ("d", 1), ("e", 1)):
        desk.enqueue(name, pages, books)
    assert desk.choose(books) == [("a", "p"), ("c", "p"), ("d", "p")]
    books.remove(1)
    assert desk.choose(books) == [("b", "p")]


def test_one_that_has_been_overtaken_for_long_holds_those_back_that_would_be_in_its_way() -> None:
    desk, books = Desk(), ledger(pages=5)
    for name, pages in (("a", 3), ("b", 4), ("c", 1)):
        desk.enqueue(name, pages, books)
    assert desk.choose(books) == [("a", "p"), ("c", "p")]
    desk.enqueue("d", 1, books)
    desk.enqueue("e", 1, books)
    desk.now = PATIENCE + 0.1
    assert desk.choose(books) == []  # there is a page, which "b" needs beside "c" when "a" ends
    books.remove(2)
    assert desk.choose(books) == [("d", "p")]
    assert desk.choose(books) == []
    books.remove(1)
    assert desk.choose(books) == [("b", "p")]
    books.remove(3)
    assert desk.choose(books) == [("e", "p")]


@pytest.mark.parametrize("patience", [PATIENCE, 9.0])
def test_nothing_is_overtaken_for_ever(patience: float) -> None:
    desk, books = Desk(99, AdmitTuning(patience=patience)), ledger(pages=4)
    for name, pages in (("a", 2), ("b", 2), ("large", 4)):
        desk.enqueue(name, pages, books)
    running, names = deque([1, 2]), [name for name, _ in desk.choose(books)]
    while "large" not in names and desk.now < 99:
        desk.now += 1.0
        desk.enqueue(f"small at {desk.now}", 2, books)
        books.remove(running.popleft())
        chosen = desk.admitted(books)
        running += [each.sequence_id for each in chosen]
        names = [each.item.request.request_id for each in chosen]
    assert desk.now == patience + 2


def test_room_stays_kept_for_the_one_that_has_it() -> None:
    desk, books = Desk(limit=99), ledger(pages=5)
    books.add(99, books.growth(request(pages=4), 16))
    desk.enqueue("large", 3, books)
    assert desk.choose(books) == []
    desk.now = PATIENCE + 0.1
    assert desk.choose(books) == []
    for number in range(LOOKAHEAD + 1):
        desk.enqueue(f"more urgent {number}", 5, books, priority="high")
    assert desk.choose(books) == []
    books.remove(99)
    assert desk.choose(books) == [("large", "p")]


def test_room_that_is_kept_on_one_pipeline_holds_nobody_back_on_others() -> None:
    desk, books = Desk(), [ledger("p", pages=6), ledger("q", pages=5)]
    for each in books:
        each.add("there", each.growth(request(pages=3), 16))
    desk.enqueue("large", 4, *books)
    assert desk.choose(*books) == []
    desk.now = PATIENCE + 0.1
    for name in ("a", "b", "c"):
        desk.enqueue(name, 2, *books)
    assert desk.choose(*books) == [("a", "p"), ("b", "q")]
    books[1].remove("there")
    assert desk.choose(books[1]) == [("c", "q")]
    books[0].remove("there")
    assert desk.choose(books[0]) == [("large", "p")]


@pytest.mark.parametrize("lookahead", [LOOKAHEAD, 2])
def test_only_so_many_are_looked_at_behind_those_that_do_not_fit(lookahead: int) -> None:
    desk, books = Desk(99, AdmitTuning(lookahead=lookahead)), ledger(pages=5)
    books.add(99, books.growth(request(pages=4), 16))
    for number in range(lookahead + 1):
        desk.enqueue(f"large {number}", 5, books)
    desk.enqueue("small", 1, books)
    assert desk.choose(books) == []
    books.remove(99)
    assert desk.choose(books) == [("large 0", "p")]


def test_a_deadline_that_cannot_be_met_is_refused_early() -> None:
    desk = Desk()
    desk.enqueue("unknown pace", 1, deadline=0.1)
    desk.admission.remove(desk.enqueue("nothing in the queue", 1, deadline=0.1))
    desk.now = 10.0
    desk.admission.count_finished(request(), 16, token_seconds=0.5)
    desk.now = 12.0
    desk.admission.count_finished(request(), 16, token_seconds=0.5)
    desk.enqueue("in time", 1, deadline=12.0 + 2.0 + 8.1)
    with pytest.raises(RequestTimeoutError, match=r"9\.0 s, and 16 output tokens") as late:
        desk.enqueue("too late", 1, deadline=12.0 + 9.0)
    assert late.value.reason == "deadline_unreachable"
    assert desk.admission.decisions["deadline_unreachable"] == 1


def test_what_has_waited_too_long_for_its_deadline_is_taken_out() -> None:
    desk = Desk()
    for seconds in (0.0, 1.0):
        desk.now = seconds
        desk.admission.count_finished(request(), 16, token_seconds=0.5)
    late = desk.enqueue("late", 1, deadline=20.0)
    desk.enqueue("early", 1, deadline=1e6)
    assert desk.admission.take_too_late() == []
    desk.now = 12.5
    ((taken, error),) = desk.admission.take_too_late()
    assert taken is late
    assert error.reason == "deadline_unreachable"
    assert len(desk.admission) == 1


def test_sequence_ids_are_never_used_twice() -> None:
    desk, books = Desk(), ledger()
    ids = []
    for name in "abc":
        item = desk.enqueue(name, 1, books)
        (admitted,) = desk.admitted(books)
        books.remove(admitted.sequence_id)
        desk.admission.requeue(item)
        (again,) = desk.admitted(books)
        ids += [admitted.sequence_id, again.sequence_id]
    assert len(set(ids)) == 6


def test_pipelines_are_filled_evenly() -> None:
    desk, small, large = Desk(), ledger("small", 4), ledger("large", 6)
    for name in "abcd":
        desk.enqueue(name, 1, small, large)
    assert len(desk.choose(small, large)) == 4
    assert (small.free, large.free) == ((2,), (4,))


def test_a_session_goes_home_while_there_is_room() -> None:
    desk, home, other = Desk(), ledger("home", 3), ledger("other", 8)
    desk.sessions.place("s", "home")
    for name in ("a", "b"):
        desk.enqueue(name, 2, home, other, session_id="s")
    assert desk.choose(home, other) == [("a", "home"), ("b", "other")]


def test_without_pipelines_requests_wait() -> None:
    desk = Desk()
    desk.enqueue("a", 99)
    assert desk.choose() == []
    assert len(desk.admission) == 1


def test_what_no_pipeline_could_ever_hold_is_refused() -> None:
    desk = Desk()
    with pytest.raises(RequestTooLargeError, match="needs 9 pages of stage 0"):
        desk.enqueue("a", 9, ledger("p", 8), ledger("q", 4))
    desk.enqueue("b", 9, ledger("p", 4), ledger("q", 9))
    assert desk.admission.decisions["request_too_large"] == 1


def test_what_waited_for_a_pipeline_and_is_too_large_is_taken_out() -> None:
    desk = Desk()
    large, small = desk.enqueue("large", 9), desk.enqueue("small", 8)
    ((taken, error),) = desk.admission.take_too_large([ledger(pages=8)])
    assert taken is large
    assert error.reason == "request_too_large"
    assert small in desk.admission
    assert desk.admission.take_too_large([]) == []


def test_a_requeued_request_is_first_again() -> None:
    desk, books = Desk(), ledger(pages=2)
    items = [desk.enqueue(name, 1, books) for name in "abcd"]
    assert desk.choose(books) == [("a", "p"), ("b", "p")]
    books.remove(1)
    desk.admission.requeue(items[0])
    books.remove(2)
    desk.admission.requeue(items[1])
    assert desk.choose(books) == [("a", "p"), ("b", "p")]
    assert desk.admission.decisions["requeued"] == 2


def test_a_removed_request_no_longer_holds_the_rest_back() -> None:
    desk, books = Desk(), ledger(pages=2)
    books.add(99, books.growth(request(), 16))
    first = desk.enqueue("a", 2, books)
    assert desk.choose(books) == []
    desk.enqueue("b", 1, books)
    desk.now = PATIENCE + 1
    assert desk.choose(books) == []
    desk.admission.remove(first)
    assert desk.choose(books) == [("b", "p")]


def test_a_full_queue_refuses() -> None:
    desk = Desk(limit=2)
    desk.enqueue("a", 1)
    desk.enqueue("b", 1)
    with pytest.raises(OverloadedError, match="2 requests are waiting and 2 may") as refused:
        desk.enqueue("c", 1)
    assert refused.value.retry_delay == 1.0
    assert len(desk.admission) == 2
    assert desk.admission.decisions["queue_full"] == 1


def test_a_tenant_may_fill_the_queue_but_lock_nobody_out() -> None:
    desk = Desk(limit=8, weights={"a": 1.0, "b": 3.0})
    for number in range(8):
        desk.enqueue(f"a{number}", 1, tenant="a")
    with pytest.raises(OverloadedError, match="8 of them of tenant 'a', whose share is 2") as raised:
        desk.enqueue("one too many", 1, tenant="a")
    assert raised.value.retry_delay
    for number in range(6):
        desk.enqueue(f"b{number}", 1, tenant="b")
    with pytest.raises(OverloadedError, match="6 of them of tenant 'b', whose share is 6"):
        desk.enqueue("one too many", 1, tenant="b")
    assert len(desk.admission) == 14
    books = ledger(pages=4)
    # Served by weights, as ever.
    assert [name for name, _ in desk.choose(books)] == ["a0", "b0", "b1", "b2"]


def test_a_deadline_counts_on_those_alone_that_are_served_before() -> None:
    desk = Desk(limit=100, weights={"a": 1.0, "b": 3.0})
    for number in range(40):
        desk.enqueue(f"a{number}", 1, tenant="a")
    for _ in range(3):  # one ends every second
        desk.now += 1.0
        desk.admission.count_finished(request(), 1, 0.0)
    desk.enqueue("b", 1, tenant="b", deadline=desk.now + 10.0)
    with pytest.raises(RequestTimeoutError, match=r"of these 41\.0 s in the queue"):
        desk.enqueue("a", 1, tenant="a", deadline=desk.now + 10.0)


TENANTS = {"a": 1.0, "b": 2.0, "c": 5.0}


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from([*TENANTS, "unheard of"]), st.booleans()), max_size=80),
)
def test_nobody_is_refused_that_has_less_than_its_share_and_the_queue_is_bounded(
    limit: int, wanted: list[tuple[str, bool]]
) -> None:
    desk = Desk(limit, weights=TENANTS)
    waiting: Counter[str] = Counter()
    least = {"unheard of": 1} | {name: int(limit * weight / 9) for name, weight in TENANTS.items()}
    for number, (tenant, serves) in enumerate(wanted):
        total = waiting.total()
        try:
            desk.enqueue(str(number), 1, tenant=tenant)
            waiting[tenant] += 1
        except OverloadedError:
            assert total >= limit
            assert waiting[tenant] >= max(1, least[tenant])
        assert len(desk.admission) == waiting.total() <= 2 * limit + len(least)
        if serves:
            for each in desk.admitted(ledger(pages=1)):
                waiting[each.item.tenant] -= 1
