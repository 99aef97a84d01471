"""Every page is free or owned by one owner, whatever is taken, given back and attempted."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from workers.budget.pages import PAGE_TOKENS, IntegrityError, OutOfPagesError, PageAllocator, pages_for

PAGES = 9
OWNERS = st.sampled_from(("a", 1, (1, "scores")))


class Allocations(RuleBasedStateMachine):
    """An allocator beside a plain list of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.owned: dict[int, object] = {}

    @rule(count=st.integers(0, PAGES), owner=OWNERS)
    def allocate(self, count: int, owner: str) -> None:
        if count > PAGES - len(self.owned):
            with pytest.raises(OutOfPagesError, match=f"{count} pages wanted"):
                self.allocator.allocate(count, owner)
            return
        pages = self.allocator.allocate(count, owner).tolist()
        assert len(pages) == count
        assert self.owned.keys().isdisjoint(pages)
        self.owned |= dict.fromkeys(pages, owner)

    @rule(pages=st.sets(st.integers(0, PAGES - 1)), owner=OWNERS)
    def release(self, pages: set[int], owner: str) -> None:
        own = [page for page in pages if self.owned.get(page) == owner]
        self.allocator.release(own, owner)
        for page in own:
            del self.owned[page]

    @rule(page=st.integers(-1, PAGES), owner=OWNERS)
    def release_what_is_not_owned(self, page: int, owner: str) -> None:
        if self.owned.get(page) != owner:
            with pytest.raises(IntegrityError, match=f"page {page} is released"):
                self.allocator.release([page], owner)

    @invariant()
    def every_page_is_free_or_owned(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.pages_in_use == len(self.owned)
        assert self.allocator.free_pages == PAGES - len(self.owned)
        for owner in {*self.owned.values()}:
            pages = {page for page, own in self.owned.items() if own == owner}
            assert self.allocator.pages_of(owner) == pages


@pytest.mark.hypothesis
def test_books_balance_after_any_allocations_and_releases() -> None:
    run_state_machine_as_test(Allocations)


def test_a_page_is_released_once() -> None:
    allocator = PageAllocator(2)
    page = allocator.allocate(1, "a")
    allocator.release(page, "a")
    with pytest.raises(IntegrityError, match="owned by None"):
        allocator.release(page, "a")
    assert allocator.free_pages == 2


def test_pages_freed_last_are_taken_before_untouched_ones() -> None:
    allocator = PageAllocator(8)
    first = allocator.allocate(3, "a").tolist()
    allocator.release(first[1:2], "a")
    assert allocator.allocate(2, "b").tolist() == [first[1], 3]


def test_requiring_pages_takes_none() -> None:
    allocator = PageAllocator(2)
    allocator.require(2)
    with pytest.raises(OutOfPagesError):
        allocator.require(3)
    assert allocator.pages_in_use == 0


@pytest.mark.parametrize(
    "tamper",
    [
        lambda books: books._free.append(books._free[0]),
        lambda books: books._free.append(next(iter(books._owner))),
        lambda books: books._free.pop(),
        lambda books: books._owner.popitem(),
        lambda books: books._free.__setitem__(0, books.pages),
    ],
    ids=["free twice", "free and owned", "lost free", "lost owned", "not of the pool"],
)
def test_tampered_books_are_found(tamper: Callable[[PageAllocator], object]) -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2, "a")
    allocator.check_integrity()
    tamper(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 160, 161])
def test_pages_hold_the_tokens_and_no_page_more(tokens: int) -> None:
    assert pages_for(tokens) == len(range(0, tokens, PAGE_TOKENS))
