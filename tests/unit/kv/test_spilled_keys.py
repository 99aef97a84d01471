"""An index of spilled keys finds those that a query attends to most, in an eighth of their memory."""

import pytest
import torch

from workers.backends.reference import ReferenceBackend
from workers.budget.footprint import index_rows
from workers.budget.pages import OutOfPagesError, pages_for
from workers.kv.pool import KVPool
from workers.kv.rows import row_format
from workers.kv.spilled_keys import SpilledKeys

KV_HEADS, HEAD_SIZE = 2, 16
DTYPES = [torch.float32, torch.bfloat16]


def build(dtype: torch.dtype, pages: int = 64) -> tuple[KVPool, SpilledKeys]:
    pool = KVPool(pages, KV_HEADS, HEAD_SIZE, dtype, torch.device("cpu"))
    keys = SpilledKeys(pool, 4, 3, 1000)
    keys.open(1)
    return pool, keys


def best(keys: SpilledKeys, sequence: int, query: torch.Tensor, spilled: int, count: int) -> list[int]:
    """The tokens that a query attends to most, by their indexed keys in layer 0."""
    index, counts = keys.batch([sequence]).batch(0), torch.tensor([spilled], dtype=torch.int32)
    (shares,) = ReferenceBackend(query.dtype).indexed_shares(query[None], index, counts)
    assert shares.sum() == pytest.approx(len(query), rel=1e-4)
    chosen: list[int] = shares.topk(count).indices.tolist()
    return chosen


def some(tokens: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, KV_HEADS, HEAD_SIZE, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_keys_take_the_memory_of_one_token(dtype: torch.dtype) -> None:
    pool, keys = build(dtype)
    for layer, tokens in enumerate((0, 1, 300)):
        keys.append(1, layer, some(tokens, dtype), 0)
    form = row_format(dtype)
    assert index_rows(300, form) == 1 + 19
    pages = sum(pages_for(index_rows(count, form)) for count in (0, 1, 300))
    assert keys.pages(1) == pool.allocator.pages_in_use == pages
    keys.close(1)
    assert pool.allocator.pages_in_use == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tokens_of_most_attention_are_found(dtype: torch.dtype) -> None:
    _, keys = build(dtype)
    spilled = some(320, dtype)
    keys.append(1, 0, spilled, 0)
    found = 0.0
    for seed in range(1, 21):
        query = some(3, dtype, seed).view(6, HEAD_SIZE) * 3  # three queries for each KV head
        grouped = query.float().view(KV_HEADS, 3, HEAD_SIZE)
        logits = torch.einsum("ngd,tnd->ngt", grouped, spilled.float()) * HEAD_SIZE**-0.5
        shares = logits.softmax(dim=-1).sum(dim=(0, 1))
        chosen = best(keys, 1, query, 320, 20)
        found += float(shares[chosen].sum() / shares.topk(20).values.sum())
    # With 4 bits and with 2; at random they would have a tenth.
    assert found / 20 > (0.97 if dtype == torch.float32 else 0.6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_come_one_after_another_are_those_that_come_together(dtype: torch.dtype) -> None:
    _, keys = build(dtype)
    keys.open(2)
    spilled = some(100, dtype)
    keys.append(1, 0, spilled, 0)
    at = 0
    for count in (100 - 57, 1, 20, 36):
        keys.append(2, 0, spilled[at : at + count], at)
        at += count
    # The first that came decide how the others are scaled.
    query = some(3, dtype, 5).view(6, HEAD_SIZE)
    own, other = (set(best(keys, key, query, 100, 30)) for key in (1, 2))
    assert len(own & other) > 24
    keys.clear(2, 0)
    keys.append(2, 0, spilled, 0)
    assert torch.equal(keys.read(1, 0).view(torch.uint8), keys.read(2, 0).view(torch.uint8))


def test_an_index_without_room_changes_nothing() -> None:
    pool, keys = build(torch.float32, pages=2)
    keys.append(1, 0, some(16, torch.float32), 0)
    before = keys.read(1, 0)
    with pytest.raises(OutOfPagesError):
        keys.append(1, 0, some(600, torch.float32, 1), 16)
    assert torch.equal(keys.read(1, 0), before)
    assert pool.allocator.pages_in_use == 1


def test_an_index_moves_bit_for_bit_and_takes_another_name() -> None:
    _, keys = build(torch.bfloat16)
    keys.append(1, 2, some(50, torch.bfloat16), 0)
    rows = keys.read(1, 2)
    keys.rename(1, 3)
    assert 1 not in keys
    assert 3 in keys
    keys.open(1)
    keys.write(1, 2, rows)
    assert torch.equal(keys.read(1, 2).view(torch.uint8), keys.read(3, 2).view(torch.uint8))
    keys.tables.check_integrity()
