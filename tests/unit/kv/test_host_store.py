"""What is read back from the host is what was spilled, bit for bit, or reported as dropped."""

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
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
from kv_doubles import DeferredLink, poison, same_bits

from workers.budget.pages import IntegrityError, pages_for
from workers.kv.host import HostStore
from workers.kv.link import MemoryLink
from workers.kv.spill_counts import SpillCounts

LAYERS, SEQUENCES, MAX_TOKENS = 2, 4, 512
LAYER = st.integers(0, LAYERS - 1)
TOKEN = (2, 1, 4)
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))


def _nothing() -> list[torch.Tensor]:
    return [torch.zeros(0, *TOKEN) for _ in range(LAYERS)]


@dataclass
class Spilled:
    """What a sequence has spilled, counted in tokens; fp32 holds every bit of bf16."""

    kv: list[torch.Tensor] = field(default_factory=_nothing)
    positions: list[list[int]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])
    fixed: bool = False
    complete: bool = True
    spilled: int = 0
    recalled: int = 0
    dropped: int = 0

    @property
    def pages(self) -> int:
        return sum(map(pages_for, map(len, self.positions)))

    def drop(self) -> None:
        self.complete = False
        self.dropped += sum(map(len, self.positions))
        self.kv, self.positions = _nothing(), [[] for _ in range(LAYERS)]


class Spills(RuleBasedStateMachine):
    """A store in poisoned memory, on a link that copies late, beside tensors that keep all."""

    store_type: type[HostStore] = HostStore
    opened: Bundle[int] = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.held: OrderedDict[int, Spilled] = OrderedDict()
        self.begun = 0
        self.random = torch.Generator().manual_seed(0)
        self.build(pages=0, dtype=torch.float32)

    @initialize(pages=st.integers(1, 10), dtype=DTYPES)
    def build(self, pages: int, dtype: torch.dtype) -> None:
        self.pages, self.link = pages, DeferredLink()
        self.like = torch.zeros(0, *TOKEN, dtype=dtype)
        self.row_bytes = 8 * dtype.itemsize
        sizes = (SEQUENCES, LAYERS, MAX_TOKENS)
        limit = pages * 16 * self.row_bytes
        self.store = poison(self.store_type(limit, self.link, *sizes, like=self.like))

    @precondition(lambda self: len(self.held) < SEQUENCES)
    @rule(target=opened, fixed=st.booleans())
    def open(self, fixed: bool) -> int:
        self.begun += 1
        self.store.open(self.begun, fixed)
        self.held[self.begun] = Spilled(fixed=fixed)
        return self.begun

    @rule(sequence=opened, layer=LAYER, tokens=st.integers(0, 40))
    def spill(self, sequence: int, layer: int, tokens: int) -> None:
        own = self.held[sequence]
        kv = torch.randn(tokens, *TOKEN, generator=self.random).to(self.like.dtype)
        positions = np.arange(own.spilled, own.spilled + tokens, dtype=np.int32)
        self.store.spill(sequence, layer, [positions[None]], kv.clone())

        own.spilled += tokens
        self.held.move_to_end(sequence)
        needed = pages_for(len(own.positions[layer]) + tokens) - pages_for(len(own.positions[layer]))
        fixed = sum(other.pages for other in self.held.values() if other.fixed or other is own)
        if not own.complete or fixed + needed > self.pages:
            own.dropped += tokens
            own.drop()
            return
        for other in self.held.values():
            if sum(each.pages for each in self.held.values()) + needed <= self.pages:
                break
            if other.pages and other is not own and not other.fixed:
                other.drop()
        own.kv[layer] = torch.cat((own.kv[layer], kv.float()))
        own.positions[layer] += positions.tolist()

    @rule(count=st.integers(1, 4))
    def complete_some_copies(self, count: int) -> None:
        self.link.complete(count)

    @rule(sequence=opened, layer=LAYER)
    def read(self, sequence: int, layer: int) -> None:
        own = self.held[sequence]
        kv = self.store.read(sequence, layer)
        if not own.complete:
            assert kv is None
            return
        self.held.move_to_end(sequence)
        own.recalled += len(own.kv[layer])
        assert kv is not None
        assert same_bits(kv, own.kv[layer].to(self.like.dtype))

    @rule(sequence=consumes(opened))
    def close(self, sequence: int) -> None:
        own = self.held.pop(sequence)
        tokens = (own.spilled, own.recalled, own.dropped)
        assert self.store.close(sequence) == SpillCounts(*(n * self.row_bytes for n in (*tokens, 0)))

    @invariant()
    def books_and_memory_are_sound(self) -> None:
        self.store.check_integrity()
        pages = sum(own.pages for own in self.held.values())
        assert self.store.bytes_in_use == pages * 16 * self.row_bytes <= self.store.limit_bytes
        for sequence, own in self.held.items():
            for layer in range(LAYERS):
                assert self.store.positions(sequence, layer).tolist() == [own.positions[layer]]

    def teardown(self) -> None:
        for sequence in list(self.held):
            self.close(sequence)
        self.link.complete(self.link.pending)
        self.store.check_integrity()
        assert self.store.bytes_in_use == 0


class ForgetsOnClose(HostStore):
    """Frees pages that copies are still on their way to."""

    def close(self, sequence: object) -> SpillCounts:
        self._sequences[sequence].writes.clear()
        return super().close(sequence)


class ForgetsOnDrop(HostStore):
    """Gives pages that copies are still on their way to to another sequence."""

    def drop(self, sequence: object) -> None:
        self._sequences[sequence].writes.clear()
        super().drop(sequence)


class ForgetsOnRead(HostStore):
    """Reads what has not arrived."""

    def read(self, sequence: object, layer: int) -> torch.Tensor | None:
        self._sequences[sequence].writes.clear()
        return super().read(sequence, layer)


@pytest.mark.hypothesis
def test_what_is_read_back_is_what_was_spilled_however_late_it_was_copied() -> None:
    run_state_machine_as_test(Spills, settings=settings(Spills.TestCase.settings, stateful_step_count=40))


@pytest.mark.parametrize("broken", [ForgetsOnClose, ForgetsOnDrop, ForgetsOnRead])
def test_a_store_that_does_not_wait_for_its_copies_is_found_out(broken: type[HostStore]) -> None:
    machine = type("Broken", (Spills,), {"store_type": broken})
    search = settings(
        Spills.TestCase.settings,
        derandomize=True,
        database=None,
        max_examples=300,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises((AssertionError, IntegrityError)):
        run_state_machine_as_test(machine, settings=search)


PAGE_BYTES = 16 * 8 * 4


def _store(pages: int, link: DeferredLink | None = None) -> HostStore:
    """A store with sequences "a", "b" and "c"."""
    limit = pages * PAGE_BYTES
    like = torch.zeros(0, *TOKEN)
    store = HostStore(limit, link or MemoryLink(), 4, LAYERS, MAX_TOKENS, like=like)
    for sequence in "abc":
        store.open(sequence)
    return store


def _spill(store: HostStore, sequence: str, tokens: int, layer: int = 0) -> torch.Tensor:
    kv = torch.randn(tokens, *TOKEN)
    store.spill(sequence, layer, [np.arange(tokens, dtype=np.int32)[None]], kv.clone())
    return kv


def test_the_least_recently_used_other_sequence_is_dropped_whole() -> None:
    store = _store(pages=4)
    _spill(store, "a", 16, layer=0)
    _spill(store, "a", 16, layer=1)
    kept = _spill(store, "b", 16)
    newest = _spill(store, "c", 32)
    assert store.read("a", 0) is None
    assert store.read("a", 1) is None
    for sequence, kv in (("b", kept), ("c", newest)):
        back = store.read(sequence, 0)
        assert back is not None
        assert same_bits(back, kv)
    assert store.close("a") == SpillCounts(2 * PAGE_BYTES, 0, 2 * PAGE_BYTES, 0)
    assert store.close("b") == SpillCounts(PAGE_BYTES, PAGE_BYTES, 0, 0)


def test_reading_is_a_use() -> None:
    store = _store(pages=2)
    _spill(store, "a", 16)
    _spill(store, "b", 16)
    store.read("a", 0)
    _spill(store, "c", 16)
    assert store.read("a", 0) is not None
    assert store.read("b", 0) is None


def test_a_sequence_that_does_not_fit_alone_drops_itself_and_no_other() -> None:
    store = _store(pages=3)
    kept = _spill(store, "a", 16)
    _spill(store, "b", 16)
    _spill(store, "b", 33)
    assert store.read("b", 0) is None
    back = store.read("a", 0)
    assert back is not None
    assert same_bits(back, kept)
    tokens = PAGE_BYTES // 16
    assert store.close("b") == SpillCounts(49 * tokens, 0, 49 * tokens, 0)


def test_what_is_fixed_is_not_dropped_for_others() -> None:
    store = _store(pages=2)
    store.open("fixed", fixed=True)
    kept = _spill(store, "fixed", 16)
    _spill(store, "a", 16)
    _spill(store, "b", 16)
    assert store.read("a", 0) is None
    assert store.read("b", 0) is not None
    _spill(store, "c", 32)
    assert store.read("c", 0) is None
    assert store.read("b", 0) is not None
    back = store.read("fixed", 0)
    assert back is not None
    assert same_bits(back, kept)


def test_what_follows_a_drop_is_dropped_too() -> None:
    store = _store(pages=1)
    _spill(store, "a", 17)
    _spill(store, "a", 1)
    assert store.bytes_in_use == 0
    assert store.close("a").dropped_bytes == 18 * PAGE_BYTES // 16


def test_a_store_smaller_than_a_page_holds_nothing() -> None:
    store = HostStore(PAGE_BYTES - 1, MemoryLink(), 1, LAYERS, MAX_TOKENS, torch.zeros(0, *TOKEN))
    store.open("a")
    _spill(store, "a", 1)
    assert store.limit_bytes == store.bytes_in_use == 0
    assert store.read("a", 0) is None


def test_a_layer_that_spilled_nothing_reads_back_empty() -> None:
    store = _store(pages=1)
    _spill(store, "a", 16, layer=0)
    back = store.read("a", 1)
    assert back is not None
    assert back.shape == (0, *TOKEN)


def test_consecutive_pages_are_filled_by_one_copy() -> None:
    link = DeferredLink()
    _spill(_store(4, link), "a", 60)
    assert link.pending == 1


def test_copies_that_are_done_are_forgotten() -> None:
    link = DeferredLink()
    store = _store(4, link)
    for _ in range(3):
        link.complete(1)
        _spill(store, "a", 5)
    assert len(store._sequences["a"].writes) == 1


def test_positions_that_do_not_match_the_tokens_are_found() -> None:
    store = _store(pages=1)
    _spill(store, "a", 5)
    store.check_integrity()
    store._sequences["a"].positions[0] = np.arange(4, dtype=np.int32)[None]
    with pytest.raises(IntegrityError, match="4 positions for 5 tokens"):
        store.check_integrity()
