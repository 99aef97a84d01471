"""Where there is room, without asking every pipeline."""

from collections.abc import Sequence

import pytest
from fake_head import hello, request

from cluster.ledger import PipelineLedger
from cluster.placement import AFFINITY, ROOMIEST, Misses, Placement
from cluster.requests import ValidatedRequest
from pyramidserve.wire import stage_state_from_message
from workers.kv.forecast import Growth


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


def opened(books: Sequence[PipelineLedger]) -> Placement:
    placement = Placement()
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
    found = placement.find(asked, asked.max_tokens, since, home, Misses())
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


def test_one_that_comes_is_tried_where_there_is_most_room_and_not_everywhere() -> None:
    books = ledgers(*[8] * (ROOMIEST + 3))
    placement = opened(books)
    for each in books:
        fill(placement, each, 4)
    assert find(placement, request(pages=6)) is None
    assert sorted(each.asked for each in books) == [0] * 3 + [1] * ROOMIEST


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


def test_home_is_worth_so_much_room_and_no_more() -> None:
    books = ledgers(40, 40)
    placement = opened(books)
    fill(placement, books[0], round(40 * AFFINITY))
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
    misses = Misses()
    sizes = (6, 7, 6, 8, 5)
    fitting = [misses.fits(books, books.growth(request(pages=pages), 16)) for pages in sizes]
    assert fitting == [False, False, False, False, True]
    assert books.asked == 2
