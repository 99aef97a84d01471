"""What a ledger says that sequences hold is what their shards will."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kv_plans import plans, with_recall

from pyramidserve.types import Compression
from workers.budget.footprint import ShardLayout, pages_held, peak_pages
from workers.budget.ledger import Ledger
from workers.budget.pages import IntegrityError
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.policies.registry import plan

LAYERS = 5
SHARDS = (ShardLayout(0, 2, 512), ShardLayout(2, 5, 512))
FULL = plan(Compression(), 20, LAYERS)
# Its first chunk is verified, and indexed, before it is compressed.
INDEXED_LATE = KeepPlan(
    prompt_tokens=1,
    kept=(1,) * LAYERS,
    recent=1,
    generation=GenerationPlan(chunk=16, window=49, start=(10,) * LAYERS, keeps=(0,) * LAYERS),
    drafts=1,
    indexes=True,
)


@given(st.lists(st.tuples(with_recall(plans(LAYERS, 60)), st.integers(0, 200)), min_size=1, max_size=4))
@example([(INDEXED_LATE, 65)])
def test_needs_are_what_the_footprint_says(wanted: list[tuple[KeepPlan, int]]) -> None:
    ledger = Ledger(SHARDS, (10_000, 10_000), sequences=4)
    for key, (keep, _) in enumerate(wanted):
        ledger.add(key, keep)
    keys, fed = list(range(len(wanted))), [count for _, count in wanted]
    expected = [[pages_held(keep, shard, count) for shard in SHARDS] for keep, count in wanted]
    assert ledger.needs(keys, fed).tolist() == expected
    # The step before is at its largest between the new token and its compression.
    before = ledger.needs(keys, [max(count - 1, 0) for count in fed], more=[1] * len(keys))
    assert (before >= ledger.needs(keys, fed)).all()
    peaks = [[peak_pages(keep, shard, count + 1) for shard in SHARDS] for keep, count in wanted]
    assert (before <= np.maximum(peaks, before * (np.array(fed) == 0)[:, None])).all()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=2, max_size=2)), max_size=40)
)
def test_free_pages_are_the_pools_less_what_is_held(actions: list[tuple[int, list[int]]]) -> None:
    pools = np.array([12, 20])
    ledger = Ledger(SHARDS, (12, 20), sequences=4)
    for key in range(4):
        ledger.add(key, FULL)
    held = np.zeros((4, 2), dtype=np.int64)
    for key, pages in actions:
        after = held.copy()
        after[key] = pages
        room = bool((after.sum(axis=0) <= pools).all())
        assert ledger.fits([key], after[[key]]) == room
        if room:
            ledger.hold([key], after[[key]])
            held = after
        else:
            with pytest.raises(IntegrityError, match="cannot hold"):
                ledger.hold([key], after[[key]])
        ledger.check_integrity()
        assert (ledger.free == pools - held.sum(axis=0)).all()
        assert (ledger.held(key) == held[key]).all()
    for key in range(4):
        ledger.remove(key)
    ledger.check_integrity()
    assert len(ledger) == 0
    assert (ledger.free == pools).all()


def test_a_place_can_be_taken_again() -> None:
    ledger = Ledger(SHARDS, (12, 20), sequences=1)
    for key in range(3):
        ledger.add(key, FULL)
        ledger.hold([key], ledger.needs([key], [0]))
        assert ledger.free.tolist() == [12 - 2 * 2, 20 - 3 * 2]
        ledger.remove(key)


def test_books_that_do_not_balance_are_found() -> None:
    ledger = Ledger(SHARDS, (12, 20), sequences=2)
    ledger.add("a", FULL)
    ledger.hold(["a"], np.array([[3, 4]]))
    ledger.free[0] += 1
    with pytest.raises(IntegrityError, match="held"):
        ledger.check_integrity()
    ledger.free[0] -= 1
    ledger.check_integrity()
    ledger._unused.append(ledger._index.pop("a"))
    with pytest.raises(IntegrityError, match="gone"):
        ledger.check_integrity()
