"""A share of bytes is as many tokens as it has room for, in every format, and no more."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.budget.footprint import ShardLayout
from workers.budget.kv_format import KV_DTYPES, KV_FORMATS, RECENT_ROOM, stored
from workers.budget.kv_share import LEAST_INDEXED, KVShare
from workers.budget.plan import INDEX_SHARE

HEAD_SIZE = 64
# A token of one head and layer in 16 bits: its key and its value.
WHOLE = 4 * HEAD_SIZE
formats = st.sampled_from(sorted(KV_FORMATS))
shares, prompts = st.floats(0.01, 1), st.integers(1, 4000)


def counted(name: str, tokens: int, prompt_tokens: int, indexes: bool) -> float:
    """Bytes of one head and layer where so many tokens stay, row by row."""
    form = KV_FORMATS[name]
    recent = RECENT_ROOM * KV_FORMATS[form.recent].row_bytes(1, HEAD_SIZE) if form.recent else 0
    rows = tokens + indexes * (prompt_tokens - tokens) / form.keys_per_row
    return rows * form.row_bytes(1, HEAD_SIZE) + recent


@given(formats, shares, prompts, st.booleans())
def test_as_many_tokens_stay_as_there_are_bytes_for(
    name: str, share: float, prompt_tokens: int, indexes: bool
) -> None:
    kv = KVShare.of(KV_FORMATS[name], HEAD_SIZE)
    tokens = math.floor(kv.in_tokens(share, prompt_tokens, indexes) * prompt_tokens + 1e-6)
    room = share * prompt_tokens * WHOLE + 1e-3
    if tokens >= 0:
        assert counted(name, tokens, prompt_tokens, indexes) <= room
    assert counted(name, tokens + 1, prompt_tokens, indexes) > room - 2e-3


@given(formats, st.floats(-0.5, 1.5), prompts, st.booleans())
def test_bytes_and_tokens_are_each_others_inverse(
    name: str, tokens: float, prompt_tokens: int, indexes: bool
) -> None:
    kv = KVShare.of(KV_FORMATS[name], HEAD_SIZE)
    share = kv.in_bytes(tokens, prompt_tokens, indexes)
    assert kv.in_tokens(share, prompt_tokens, indexes) == pytest.approx(tokens, abs=1e-9)


@given(formats, shares, prompts, st.booleans())
def test_what_is_asked_for_is_all_or_what_fits_or_the_least(
    name: str, share: float, prompt_tokens: int, indexes: bool
) -> None:
    kv = KVShare.of(KV_FORMATS[name], HEAD_SIZE)
    tokens = kv.in_tokens(share, prompt_tokens, indexes)
    kv_keep = kv.kv_keep(share, prompt_tokens, indexes)
    assert (kv_keep == 1) == (tokens >= 1 or (prompt_tokens == 1 and not indexes))
    if indexes:
        assert kv_keep > LEAST_INDEXED
        least = tokens + INDEX_SHARE * (1 - tokens) <= LEAST_INDEXED
    else:
        assert int(kv_keep * prompt_tokens * (1 + 1e-12)) >= 1
        least = tokens * prompt_tokens <= 1
    if not least and kv_keep < 1:
        kept = (kv_keep - indexes * INDEX_SHARE) / (1 - indexes * INDEX_SHARE)
        assert kv.in_bytes(kept, prompt_tokens, indexes) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "all_tokens"), [("float32", 2.0), ("bfloat16", 1.0), ("int8", 0.515625), ("int4", 0.265625)]
)
def test_what_all_tokens_of_a_long_prompt_take(name: str, all_tokens: float) -> None:
    kv = KVShare.of(KV_FORMATS[name], HEAD_SIZE)
    assert kv.in_bytes(1, 10**9) == pytest.approx(all_tokens, abs=1e-6)
    assert kv.kv_keep(min(1.0, all_tokens + 1e-6), 10**9) == (1 if all_tokens <= 1 else 0.5)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_shard_knows_it_by_its_pages(name: str) -> None:
    form = KV_FORMATS[name]
    layout = ShardLayout(0, 1, form.page_bytes(3, HEAD_SIZE), 3, name)
    assert layout.kv_share == KVShare.of(form, HEAD_SIZE)


def test_what_a_deployment_says_is_a_format() -> None:
    for kv_dtype in KV_DTYPES:
        assert stored(kv_dtype, "float32") == ("float32" if kv_dtype == "auto" else kv_dtype)
        assert stored(kv_dtype, "auto") == ("bfloat16" if kv_dtype == "auto" else kv_dtype)
