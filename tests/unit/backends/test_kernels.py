"""Every set of kernels does what the plain calculation in fp32 does, on ragged shapes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.backends.cpu import native
from workers.backends.cpu.build import KernelBuildError, load_library
from workers.backends.cpu.native import CpuBackend
from workers.backends.interface import Backend
from workers.backends.reference import ReferenceBackend
from workers.backends.tuning import ReferenceTuning
from workers.budget.kv_format import KV_FORMATS
from workers.budget.pages import PAGE_TOKENS, pages_for
from workers.kv.pool import KVPool, PagedBatch
from workers.kv.rows import decode, encode, row_dtype, row_format, row_shape
from workers.kv.spilled_keys import SpilledKeys, index_scales, unpack
from workers.model.operations import HeadNorms

# (heads, KV heads): one key for each head, for groups of heads, for all of them.
HEADS = [(4, 4), (6, 2), (9, 3), (4, 1), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [None, None, *map(row_dtype, KV_FORMATS)]
KernelsFor = Callable[..., Backend]
seeds = st.integers(0, 2**32)
heads = st.sampled_from(HEADS)
dtypes = st.sampled_from(DTYPES)
formats = st.sampled_from(FORMATS)
head_sizes = st.sampled_from([8, 32, 64])


@pytest.fixture(scope="module", params=["torch", "native", "native with bf16 activations"])
def kernels_for(request: pytest.FixtureRequest) -> KernelsFor:
    """Kernels for weights and KV of a type."""
    if request.param == "torch":
        return ReferenceBackend
    try:
        library = load_library()
    except KernelBuildError as error:
        pytest.skip(f"no native kernels here: {error}")

    def make(dtype: torch.dtype, tuning: ReferenceTuning = ReferenceTuning()) -> Backend:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "multiplies_bf16", lambda _: request.param != "native")
            return CpuBackend(library, dtype, tuning)

    return make


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal but for what rounding to ``dtype`` on the way leaves."""
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    return torch.allclose(got.float(), expected, rtol=tolerance, atol=tolerance)


@given(
    seeds,
    st.integers(1, 70) | st.integers(1, 600),
    st.sampled_from([1, 2, 30, 64, 100, 300]),
    st.sampled_from([1, 16, 50, 576]),
    st.booleans(),
    dtypes,
)
def test_linear(
    kernels_for: KernelsFor, seed: int, rows: int, columns: int, size: int, biased: bool, dtype: torch.dtype
) -> None:
    kernels = kernels_for(dtype)
    x, weight = draw(seed, rows, size).to(kernels.activations), draw(seed + 1, columns, size).to(dtype)
    bias = draw(seed + 2, columns).to(dtype)
    expected = x.double() @ weight.double().T + (bias if biased else 0)
    got = kernels.linear(x, weight, bias if biased else None)
    assert got.dtype == kernels.activations
    # Terms of both signs: what is left of them may be far smaller than they are.
    assert near(got / size**0.5, (expected / size**0.5).float(), dtype)


@given(seeds, st.integers(1, 80), st.sampled_from([2, 64, 100]), st.sampled_from([1, 16, 50, 576]), dtypes)
def test_logits_are_not_rounded(
    kernels_for: KernelsFor, seed: int, rows: int, columns: int, size: int, dtype: torch.dtype
) -> None:
    kernels = kernels_for(dtype)
    x, weight = draw(seed, rows, size).to(kernels.activations), draw(seed + 1, columns, size).to(dtype)
    got = kernels.logits(x, weight)
    assert got.dtype == torch.float32
    expected = x.double() @ weight.double().T
    assert near(got / size**0.5, (expected / size**0.5).float(), torch.float32)


@given(seeds, st.integers(0, 40), st.sampled_from([1, 16, 100, 576]), dtypes)
def test_rms_norm(kernels_for: KernelsFor, seed: int, rows: int, size: int, dtype: torch.dtype) -> None:
    kernels = kernels_for(dtype)
    x, weight = draw(seed, rows, size).to(kernels.activations), draw(seed + 1, size).to(dtype)
    root = (x.float().square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert near(kernels.rms_norm(x, weight, 1e-5), x.float() / root * weight.float(), dtype)


@given(seeds, st.integers(0, 40), st.sampled_from([1, 16, 100, 1536]), dtypes)
def test_silu_product(kernels_for: KernelsFor, seed: int, rows: int, size: int, dtype: torch.dtype) -> None:
    kernels = kernels_for(dtype)
    gate_up = (draw(seed, rows, 2 * size) * 30).to(kernels.activations)
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert near(kernels.silu_product(gate_up.clone()), gate * gate.sigmoid() * up, dtype)


@given(seeds, heads, st.integers(0, 20), head_sizes, dtypes, st.booleans(), st.booleans())
def test_rotate(
    kernels_for: KernelsFor,
    seed: int,
    heads: tuple[int, int],
    rows: int,
    size: int,
    dtype: torch.dtype,
    normed: bool,
    still: bool,
) -> None:
    kernels, (count, kv_count) = kernels_for(dtype), heads
    projected = draw(seed, rows, count + 2 * kv_count, size).to(kernels.activations)
    angles = torch.zeros(rows, size // 2) if still else draw(seed + 1, rows, size // 2) * 3
    rotation = None if still else (angles.cos(), angles.sin())
    weights = draw(seed + 2, 2, size).to(dtype)
    norms = HeadNorms(weights[0], weights[1], 1e-5) if normed else None
    query, kv = kernels.rotate(projected, rotation, count, kv_count, norms)
    before = projected.float()
    if norms is not None:
        scales = torch.cat([each.float().expand(n, -1) for each, n in zip(weights, heads, strict=True)])
        turned = before[:, : count + kv_count]
        turned = turned / (turned.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * scales
        before = torch.cat((turned, before[:, count + kv_count :]), dim=1)
    # A rotation is the product with a number of length 1 in the complex plane.
    first, second = before.chunk(2, dim=-1)
    turned = torch.view_as_real(torch.complex(first, second) * torch.polar(torch.ones(1), angles[:, None]))
    expected = torch.cat((turned[..., 0], turned[..., 1]), dim=-1)
    assert near(query, expected[:, :count], dtype)
    assert near(kv[:, 0], expected[:, count : count + kv_count], dtype)
    assert torch.equal(kv[:, 1], projected[:, count + kv_count :].to(dtype))


@given(
    seeds,
    heads,
    st.integers(1, 70) | st.integers(1, 400),
    st.sampled_from([8, 16, 48, 64]),
    dtypes,
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 500) | st.none(),
    st.booleans(),
)
def test_the_newest_rows_attend_to_all_before_them_and_the_newest_of_them_score(
    kernels_for: KernelsFor,
    seed: int,
    heads: tuple[int, int],
    tokens: int,
    head_size: int,
    dtype: torch.dtype,
    row_share: float,
    window_share: float,
    context_share: float,
    reach: int | None,
    greatest: bool,
) -> None:
    kernels = kernels_for(dtype)
    rows = max(1, int(row_share * tokens))
    window = int(window_share * rows)
    context = int(context_share * tokens)
    query = (draw(seed, rows, heads[0], head_size) * 2).to(kernels.activations)
    kv = draw(seed + 1, tokens, 2, heads[1], head_size).to(dtype)
    weights = draw(seed + 2, window).abs()
    starts = None
    if reach is not None:  # as after a cut, which leaves gaps that a row may reach across
        last = torch.arange(tokens - rows, tokens)
        starts = (last + 1 - reach + draw(seed + 3, rows).abs().cumsum(0).long()).clamp(0).minimum(last)
        starts = starts.cummax(0).values.to(torch.int32)
    attended, scores = kernels.prefill_attention(query, kv, weights, context, starts, greatest)
    key, value = kv.float().repeat_interleave(heads[0] // heads[1], dim=2).unbind(1)
    logits = torch.einsum("mhd,nhd->hmn", query.float(), key) / head_size**0.5
    logits += torch.full((rows, tokens), -torch.inf).triu(tokens - rows + 1)
    if starts is not None:
        logits.masked_fill_(torch.arange(tokens) < starts[:, None], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    assert near(attended, torch.einsum("hmn,nhd->mhd", probabilities, value).flatten(1), dtype)
    newest = probabilities.unflatten(0, (heads[1], -1))[..., rows - window :, :context] * weights[:, None]
    expected = newest.mean(dim=1).sum(dim=1)
    if greatest:
        expected = newest.amax(dim=(1, 2)) if window else torch.zeros_like(expected)
    assert scores.dtype == torch.float32
    assert near(scores, expected, dtype)


def scattered(
    seed: int, lengths: list[int], kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[PagedBatch, list[torch.Tensor]]:
    """Caches of these lengths on pages in any order, among poison; and what is in them."""
    width, count = max(map(pages_for, lengths)), sum(map(pages_for, lengths))
    order = torch.randperm(count + 1, generator=torch.Generator().manual_seed(seed))
    free, taken = order[0], iter(order[1:])
    pool = torch.empty((count + 1) * PAGE_TOKENS, *row_shape(kv_heads, head_size, dtype), dtype=dtype)
    pool.view(torch.uint8).fill_(255)  # NaN, or a scale that is
    pages = torch.full((len(lengths), width), int(free), dtype=torch.int32)
    caches = [draw(seed + row, length, 2, kv_heads, head_size) for row, length in enumerate(lengths)]
    caches = [encode(cache, dtype) for cache in caches]
    for row, cache in enumerate(caches):
        for index, part in enumerate(torch.split(cache, PAGE_TOKENS) if len(cache) else ()):
            pages[row, index] = next(taken)
            first = pages[row, index] * PAGE_TOKENS
            pool[first : first + len(part)] = part
    caches = [decode(cache).float() for cache in caches]
    return PagedBatch(pool, pages, torch.tensor(lengths, dtype=torch.int32)), caches


@given(
    seeds,
    heads,
    st.lists(st.integers(1, 70) | st.integers(1, 800), min_size=1, max_size=5),
    head_sizes,
    dtypes,
    st.integers(0, 80),
    st.integers(1, 40_000),
    st.sampled_from([0, 0, 3, 40, 300]),
    st.none() | st.floats(0, 1),
    formats,
    formats,
    st.sampled_from([0, 0, 1, 5, 40]),
)
def test_a_step_attends_to_each_cache_up_to_its_length(
    kernels_for: KernelsFor,
    seed: int,
    heads: tuple[int, int],
    lengths: list[int],
    head_size: int,
    dtype: torch.dtype,
    tail: int,
    gathered_bytes: int,
    spilled: int,
    unseen: float | None,
    stored: torch.dtype | None,
    spilled_as: torch.dtype | None,
    finer: int,
) -> None:
    kernels = kernels_for(dtype, ReferenceTuning(gather_bytes=gathered_bytes))
    query = draw(seed, len(lengths), heads[0], head_size).to(kernels.activations)
    batch, caches = scattered(seed + 1, lengths, heads[1], head_size, stored or dtype)
    if finer:
        # Pages that begin anywhere, with some of the newest tokens: none of the first sequence.
        counts = [min(finer * row, length) for row, length in enumerate(lengths)]
        ahead = [(5 * row) % 8 for row in range(len(lengths))]
        every = [max(1, count + before) for count, before in zip(counts, ahead, strict=True)]
        better, finest = scattered(seed + 5, every, heads[1], head_size, torch.float32)
        before_them = torch.tensor(every) - torch.tensor(counts)
        better = dataclasses.replace(better, starts=before_them.to(torch.int32))
        for row, begin in enumerate(before_them.tolist()):  # where nothing has been written yet
            slots = torch.arange(begin)
            places = better.pages[row, slots // PAGE_TOKENS] * PAGE_TOKENS + slots % PAGE_TOKENS
            better.rows[places.long()] = torch.nan
        batch = dataclasses.replace(batch, recent=better)
        for cache, other, few in zip(caches, finest, counts, strict=True):
            if few:
                cache[len(cache) - few :] = other[len(other) - few :]
    behind = [cache[:0] for cache in caches]
    if spilled:  # the first has nothing there
        counts = [spilled * row for row in range(len(lengths))]
        beyond_as = spilled_as or dtype
        there, behind = scattered(seed + 9, [max(1, *counts), *counts], heads[1], head_size, beyond_as)
        there, behind = (
            dataclasses.replace(there, pages=there.pages[1:], lengths=there.lengths[1:]),
            behind[1:],
        )
        batch = dataclasses.replace(batch, spilled=there)
    starts = [[0] * len(lengths)] * 2
    if unseen is not None:
        # All of what is spilled may be out of reach, but not the newest token.
        starts = [
            # What is finer is within reach.
            [int(unseen * max(0, length - max(1, finer * row))) for row, length in enumerate(lengths)],
            [int(unseen * 1.5 * len(each)) for each in behind],
        ]
        own, beyond = (torch.tensor(each, dtype=torch.int32) for each in starts)
        far = dataclasses.replace(batch.spilled, starts=beyond) if batch.spilled else None
        batch = dataclasses.replace(batch, starts=own, spilled=far)
    attended = kernels.decode_attention(query, batch, tail)
    shares = attended.shares
    assert shares.shape == (len(lengths), heads[1], tail)
    for row, (length, cache) in enumerate(zip(lengths, caches, strict=True)):
        first = starts[0][row]
        whole = torch.cat((cache[first:], behind[row][starts[1][row] :]))
        key, value = whole.float().repeat_interleave(heads[0] // heads[1], dim=2).unbind(1)
        logits = torch.einsum("hd,nhd->hn", query[row].float(), key) / head_size**0.5
        probabilities = logits.softmax(dim=-1)
        assert near(attended.out[row], torch.einsum("hn,nhd->hd", probabilities, value).flatten(), dtype)
        assert near(attended.lse[row], logits.logsumexp(dim=-1), dtype)
        seen = probabilities.unflatten(0, (heads[1], -1)).mean(dim=1)[:, : length - first]
        newest = torch.nn.functional.pad(seen, (first, 0))[:, max(0, length - tail) :]
        count = newest.shape[1]
        assert near(shares[row, :, tail - count :], newest, dtype)
        assert not shares[row, :, : tail - count].any()


@given(
    seeds,
    st.lists(st.integers(0, 40) | st.integers(1, 700), min_size=1, max_size=4).filter(any),
    heads,
    head_sizes,
    dtypes,
    formats,
)
@settings(max_examples=examples(60))
def test_indexed_keys_get_the_shares_of_a_softmax_over_their_codes(
    kernels_for: KernelsFor,
    seed: int,
    spilled: list[int],
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    stored: torch.dtype | None,
) -> None:
    (query_heads, kv_heads), sequences = heads, len(spilled)
    pool = KVPool(2000, kv_heads, head_size, stored or dtype, torch.device("cpu"))
    pool.rows.view(torch.uint8).fill_(255)
    keys = SpilledKeys(pool, sequences, 1, 1000)
    for sequence, count in enumerate(spilled):
        keys.open(sequence)
        keys.append(sequence, 0, draw(seed + sequence, count, kv_heads, head_size).to(dtype), 0)
    kernels = kernels_for(dtype)
    query = draw(seed, sequences, query_heads, head_size).to(kernels.activations)
    index, counts = keys.batch(range(sequences)).batch(0), torch.tensor(spilled, dtype=torch.int32)
    shares = kernels.indexed_shares(query, index, counts)
    assert shares.shape == (sequences, max(spilled))
    for row, count in enumerate(spilled):
        assert (shares[row, count:] == -1).all()
        if not count:
            continue
        rows = keys.read(row, 0)
        scaling = row_format(rows.dtype).index_scale_rows
        codes = unpack(rows[scaling:])[:count].float().view(count, kv_heads, head_size)
        steps = index_scales(rows[:scaling])[1].view(kv_heads, 1, head_size)
        asked = query[row].float().view(kv_heads, -1, head_size) * steps
        logits = torch.einsum("ngd,tnd->ngt", asked, codes) * head_size**-0.5
        expected = logits.softmax(dim=-1).sum(dim=(0, 1))
        assert torch.allclose(shares[row, :count], expected, rtol=1e-3, atol=1e-5)
