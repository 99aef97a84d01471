"""Every slot of every layer of every sequence has a row of its own, which it keeps while it lives."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from workers.budget.pages import PAGE_TOKENS, IntegrityError, OutOfPagesError, PageAllocator, pages_for
from workers.kv.page_table import PageTables

LAYERS, SEQUENCES, MAX_TOKENS = 3, 4, 100
LAYER = st.integers(0, LAYERS - 1)


class Tables(RuleBasedStateMachine):
    """Page tables beside plain lists of the rows that every layer of every sequence has."""

    opened: Bundle[int] = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, list[list[int]]] = {}
        self.begun = 0
        self.build(pages=0)

    @initialize(pages=st.integers(1, 30))
    def build(self, pages: int) -> None:
        self.pages = pages
        self.tables = PageTables(PageAllocator(pages), SEQUENCES, LAYERS, MAX_TOKENS)

    @property
    def free(self) -> int:
        held = (len(rows) for layers in self.held.values() for rows in layers)
        return self.pages - sum(map(pages_for, held))

    @precondition(lambda self: len(self.held) < SEQUENCES)
    @rule(target=opened)
    def open(self) -> int:
        self.begun += 1
        self.tables.open(self.begun)
        self.held[self.begun] = [[] for _ in range(LAYERS)]
        return self.begun

    @rule(sequence=consumes(opened))
    def close(self, sequence: int) -> None:
        self.tables.close(sequence)
        del self.held[sequence]

    @rule(sequence=opened, layer=LAYER, length=st.integers(0, MAX_TOKENS))
    def resize(self, sequence: int, layer: int, length: int) -> None:
        rows = self.held[sequence][layer]
        if pages_for(length) - pages_for(len(rows)) > self.free:
            with pytest.raises(OutOfPagesError):
                self.tables.resize(sequence, layer, length)
            return
        self.tables.resize(sequence, layer, length)
        now = self.tables.rows(sequence, layer, 0, length).tolist()
        stay = min(len(rows), length)
        assert now[:stay] == rows[:stay]
        self.held[sequence][layer] = now

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        room = [key for key, layers in self.held.items() if max(map(len, layers)) < MAX_TOKENS]
        chosen = data.draw(st.lists(st.sampled_from(room), unique=True) if room else st.just([]))
        full = sum(len(rows) % PAGE_TOKENS == 0 for key in chosen for rows in self.held[key])
        if full > self.free:
            with pytest.raises(OutOfPagesError):
                self.tables.extend(chosen)
        elif chosen:
            rows = self.tables.extend(chosen)
            assert rows.dtype == np.int64
            for layer, of_layer in enumerate(rows.tolist()):
                for key, row in zip(chosen, of_layer, strict=True):
                    self.held[key][layer].append(row)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def batch(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, min_size=1))
        pages, lengths = self.tables.batch(chosen)
        assert pages.dtype == lengths.dtype == np.int32
        held = [[self.held[key][layer] for key in chosen] for layer in range(len(lengths))]
        assert lengths.tolist() == [[len(rows) for rows in of_layer] for of_layer in held]
        assert pages.shape == (*lengths.shape, pages_for(int(lengths.max())))
        for of_layer, all_rows in zip(pages.tolist(), held, strict=True):
            for own, rows in zip(of_layer, all_rows, strict=True):
                assert [
                    own[slot // PAGE_TOKENS] * PAGE_TOKENS + slot % PAGE_TOKENS for slot in range(len(rows))
                ] == rows

    @invariant()
    def every_slot_has_a_row_of_its_own(self) -> None:
        self.tables.check_integrity()
        every: list[int] = []
        for key, layers in self.held.items():
            for layer, rows in enumerate(layers):
                assert self.tables.length(key, layer) == len(rows)
                assert self.tables.rows(key, layer, 0, len(rows)).tolist() == rows
                every += rows
            assert self.tables.pages_of(key) == sum(pages_for(len(rows)) for rows in layers)
        assert len(set(every)) == len(every)
        assert all(0 <= row < self.pages * PAGE_TOKENS for row in every)
        assert self.tables.allocator.free_pages == self.free
        assert {key for key in range(self.begun + 1) if key in self.tables} == self.held.keys()

    def teardown(self) -> None:
        for sequence in list(self.held):
            self.close(sequence)
        assert self.tables.allocator.pages_in_use == 0


@pytest.mark.hypothesis
def test_tables_follow_plain_lists_of_rows() -> None:
    run_state_machine_as_test(Tables)


@pytest.fixture
def tables() -> PageTables:
    """Three pages, of which sequence "a" has two and "b" one."""
    tables = PageTables(PageAllocator(3), 2, 2, 32)
    tables.open("a")
    tables.open("b")
    tables.resize("a", 0, 16)
    tables.resize("a", 1, 10)
    tables.resize("b", 0, 16)
    return tables


def test_extending_a_batch_takes_nothing_when_one_page_is_missing(tables: PageTables) -> None:
    with pytest.raises(OutOfPagesError):
        tables.extend(["a", "b"])
    assert [tables.length(key, 0) for key in ("a", "b")] == [16, 16]
    assert tables.allocator.free_pages == 0
    tables.check_integrity()


def test_slots_within_a_page_need_no_free_page(tables: PageTables) -> None:
    tables.resize("a", 0, 9)
    before = [tables.rows("a", layer, 8 + layer, 9 + layer)[0] for layer in (0, 1)]

    assert tables.extend(["a"]).tolist() == [[before[0] + 1], [before[1] + 1]]


def test_a_range_of_slots_is_that_part_of_the_rows(tables: PageTables) -> None:
    tables.resize("b", 0, 0)
    tables.resize("a", 0, 30)
    assert tables.rows("a", 0, 14, 19).tolist() == tables.rows("a", 0, 0, 30).tolist()[14:19]


def test_a_table_costs_its_pages_and_lengths_in_int32() -> None:
    tables = PageTables(PageAllocator(0), 3, layers=5, max_tokens=33)
    assert tables.bytes_per_sequence == 5 * (3 + 1) * 4


@pytest.mark.parametrize(
    "tamper",
    [
        lambda books: books._pages.__setitem__((0, 1, 0), books._pages[0, 0, 0]),
        lambda books: books._pages.__setitem__((1, 0, 0), books._pages[0, 0, 0]),
        lambda books: books.allocator.release([int(books._pages[1, 0, 0])], "b"),
        lambda books: books._lengths.__setitem__((0, 0), 0),
        lambda books: books._lengths.__setitem__((0, 0), 17),
        lambda books: books._unused.append(books._index.pop("b")),
        lambda books: books.allocator._free.append(0),
    ],
    ids=["twice", "of another", "free", "lost", "too few", "unused", "allocator"],
)
def test_tampered_tables_are_found(tables: PageTables, tamper: Callable[[PageTables], object]) -> None:
    tables.check_integrity()
    tamper(tables)
    with pytest.raises(IntegrityError):
        tables.check_integrity()
