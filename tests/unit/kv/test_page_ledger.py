"""Reservations of pages never exceed the pools, whatever is promised and taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv.ledger import Ledger
from workers.kv.pages import IntegrityError

POOLS = (7, 12)
NEEDS = st.tuples(*[st.integers(0, pages + 2) for pages in POOLS])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), NEEDS), max_size=40))
def test_free_pages_are_the_pools_less_what_is_promised(
    actions: list[tuple[bool, int, tuple[int, ...]]],
) -> None:
    ledger = Ledger(POOLS, max_sequences=3)
    promised: dict[int, tuple[int, ...]] = {}
    for reserves, sequence, needs in actions:
        free = tuple(
            total - sum(each[rank] for each in promised.values()) for rank, total in enumerate(POOLS)
        )
        room = len(promised) < 3 and all(map(int.__le__, needs, free))
        assert ledger.fits(needs) == room
        if reserves and room and sequence not in promised:
            ledger.reserve(sequence, needs)
            promised[sequence] = needs
        elif reserves:
            with pytest.raises(IntegrityError, match="cannot reserve"):
                ledger.reserve(sequence, needs)
            assert ledger.free == free
        elif sequence in promised:
            ledger.release(sequence)
            del promised[sequence]
        ledger.check_integrity()
        assert {key for key in range(6) if key in ledger} == promised.keys()
        assert len(ledger) == len(promised)
    for sequence in promised:
        ledger.release(sequence)
    assert ledger.free == ledger.pages == POOLS


@settings(deadline=None)
@given(NEEDS)
def test_what_could_ever_be_held_is_what_fits_an_empty_ledger(needs: tuple[int, ...]) -> None:
    ledger = Ledger(POOLS, max_sequences=1)
    alone = ledger.fits(needs)
    ledger.reserve("other", POOLS)
    assert ledger.could_ever_hold(needs) == alone


def test_no_more_sequences_are_promised_pages_than_may_run() -> None:
    ledger = Ledger(POOLS, max_sequences=2)
    ledger.reserve("a", (0, 0))
    assert ledger.fits((0, 0))
    ledger.reserve("b", (0, 0))
    assert not ledger.fits((0, 0))


def test_a_promise_is_taken_back_once() -> None:
    ledger = Ledger(POOLS, max_sequences=1)
    ledger.reserve("a", (1, 1))
    ledger.release("a")
    with pytest.raises(KeyError):
        ledger.release("a")
    assert ledger.free == POOLS


def test_needs_must_name_every_shard() -> None:
    with pytest.raises(ValueError, match="zip"):
        Ledger(POOLS, max_sequences=1).fits((1,))


@pytest.mark.parametrize("free", [[6, 12], [8, 12], [7, 11]])
def test_tampered_books_are_found(free: list[int]) -> None:
    ledger = Ledger(POOLS, max_sequences=1)
    ledger._free = free
    with pytest.raises(IntegrityError, match="shard"):
        ledger.check_integrity()


def test_promises_beyond_the_pool_are_found() -> None:
    ledger = Ledger(POOLS, max_sequences=1)
    ledger._reserved["a"], ledger._free = (8, 0), [-1, 12]
    with pytest.raises(IntegrityError, match="shard 0"):
        ledger.check_integrity()
