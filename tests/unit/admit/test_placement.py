"""Where there is room, without asking every pipeline."""

from collections.abc import Sequence

import pytest
from fake_head import hello, request
from hypothesis import given
from hypothesis import strategies as st

from cluster.admit.ledger import PipelineLedger
from cluster.admit.placement import Look, Placement
from cluster.admit.request import ValidatedRequest
from cluster.admit.tuning import AdmitTuning
from pyramidserve.wire import stage_state_from_message
from workers.budget.forecast import Growth

ROOMIEST, AFFINITY = AdmitTuning().roomiest, AdmitTuning().affinity


class Asked(PipelineLedger):
    """A ledger that counts how often it is asked whether something fits."""

    asked = 0

    def fits(self, more: Growth, done: int = 0) -> bool:
        self.asked += 1
        return super().fits(more, done)


def ledgers(*pages: int) -> list[Asked]:
    """Pipelines of one stage and ``pages``."""
    return [
        Asked(f"p{number}", [stage_state_from_message(stage) for stage in hello(pages=(count,)).stages], 8)
        for number, count in enumerate(pages)
    ]


def opened(books: Sequence[PipelineLedger], tuning: AdmitTuning = AdmitTuning()) -> Placement:
    placement = Placement(tuning)
    for each in books:
        placement.gained(each)
    return placement


def fill(placement: Placement, ledger: PipelineLedger, pages: int, name: str = "there") -> None:
    asked = request(pages=pages)
    ledger.add(name, ledger.growth(asked, asked.max_tokens))
    placement.took(ledger)


def find(
    placement: Placement, asked: ValidatedRequest, since: int | None = None, home: str | None = None
) -> str | None:
    found = placement.find(asked, asked.max_tokens, since, home, Look())
    return None if found is None else found.pipeline_id


def test_pipelines_stand_in_the_order_of_their_room() -> None:
    books = ledgers(8, 8, 8)
    placement = opened(books)
    fill(placement, books[1], 2)
    fill(placement, books[2], 1)
    assert [each.pipeline_id for each in placement] == ["p0", "p2", "p1"]
    books[1].remove("there")
    placement.gained(books[1])
    fill(placement, books[0], 3)
    assert [each.pipeline_id for each in placement] == ["p1", "p2", "p0"]


@pytest.mark.parametrize("roomiest", [ROOMIEST, 1])
def test_one_that_comes_is_tried_where_there_is_most_room_and_not_everywhere(roomiest: int) -> None:
    books = ledgers(*[8] * (roomiest + 3))
    placement = opened(books, AdmitTuning(roomiest=roomiest))
    for each in books:
        fill(placement, each, 4)
    assert find(placement, request(pages=6)) is None
    assert sorted(each.asked for each in books) == [0] * 3 + [1] * roomiest


def test_those_that_could_never_hold_it_do_not_count() -> None:
    books = ledgers(*[4] * ROOMIEST, 8)
    placement = opened(books)
    fill(placement, books[-1], 2)
    assert find(placement, request(pages=6)) == f"p{ROOMIEST}"


def test_one_that_has_missed_is_tried_only_where_something_has_ended() -> None:
    books = ledgers(8, 8, 8)
    placement = opened(books)
    for each in books:
        fill(placement, each, 4)
    since = placement.gains
    assert find(placement, request(pages=6), since) is None
    assert all(each.asked == 0 for each in books)
    books[1].remove("there")
    placement.gained(books[1])
    assert find(placement, request(pages=6), since) == "p1"
    assert [each.asked for each in books] == [0, 1, 0]


@pytest.mark.parametrize(("home", "found"), [("p2", "p2"), ("gone", "p0"), (None, "p0"), ("p1", "p0")])
def test_home_is_preferred_if_it_has_room(home: str | None, found: str) -> None:
    books = ledgers(8, 8, 8)
    placement = opened(books)
    fill(placement, books[1], 3)
    fill(placement, books[2], 1)
    assert find(placement, request(pages=6), home=home) == found


@pytest.mark.parametrize("affinity", [AFFINITY, 0.25])
def test_home_is_worth_so_much_room_and_no_more(affinity: float) -> None:
    books = ledgers(40, 40)
    placement = opened(books, AdmitTuning(affinity=affinity))
    fill(placement, books[0], round(40 * affinity))
    assert find(placement, request(pages=4), home="p0") == "p0"
    fill(placement, books[0], 1, "one more")
    assert find(placement, request(pages=4), home="p0") == "p1"


def test_a_closed_pipeline_is_given_nothing_until_it_opens_again() -> None:
    (books,) = ledgers(8)
    placement = opened([books])
    placement.close("p0")
    placement.close("p0")
    assert len(placement) == 0
    assert find(placement, request()) is None
    assert find(placement, request(), since=0, home="p0") is None
    placement.gained(books)
    assert find(placement, request()) == "p0"


def test_what_is_no_smaller_than_what_had_no_room_is_not_tried() -> None:
    (books,) = ledgers(8)
    books.add("there", books.growth(request(pages=3), 16))
    look = Look()
    sizes = (6, 7, 6, 8, 5)
    fitting = [look.fits(books, books.growth(request(pages=pages), 16)) for pages in sizes]
    assert fitting == [False, False, False, False, True]
    assert books.asked == 2


def test_room_is_kept_where_there_is_most_of_it() -> None:
    books = ledgers(4, 8, 8)
    placement = opened(books)
    fill(placement, books[1], 5)
    fill(placement, books[2], 3)
    kept = placement.keep(request(pages=6), 16)
    assert kept is not None
    assert (kept.pipeline_id, kept.in_the_way) == ("p2", {"there"})
    assert placement.keep(request(pages=9), 16) is None


def test_kept_room_is_left_alone_on_its_pipeline_and_no_other() -> None:
    books = ledgers(8, 8)
    placement = opened(books)
    fill(placement, books[0], 4)
    fill(placement, books[1], 5)
    look = Look(placement.keep(request(pages=6), 16))
    sizes = (3, 2, 4)
    more = [books[0].growth(request(pages=pages), 16) for pages in sizes]
    assert [look.fits(books[0], each) for each in more] == [False, True, False]
    assert [look.fits(books[1], each) for each in more] == [True, True, False]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 16)), max_size=6),
    st.tuples(st.integers(1, 12), st.integers(1, 16)),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 16)), max_size=6),
)
def test_what_room_is_kept_for_fits_as_soon_as_nothing_is_in_its_way(
    there: list[tuple[int, int]], held_up: tuple[int, int], later: list[tuple[int, int]]
) -> None:
    (books,) = ledgers(12)
    placement = opened([books])
    for number, (pages, expected) in enumerate(there):
        more = books.growth(request(pages=pages), expected)
        if books.fits(more):
            books.add(number, more)
    more = books.growth(request(pages=held_up[0]), held_up[1])
    if not books.could_ever_hold(more):
        return
    look = Look(placement.keep(request(pages=held_up[0]), held_up[1]))
    assert look.kept is not None
    for number, (pages, expected) in enumerate(later):
        other = books.growth(request(pages=pages), expected)
        if look.fits(books, other):
            books.add(f"later {number}", other)
    for key in look.kept.in_the_way:
        books.remove(key)
    assert books.fits(more)
