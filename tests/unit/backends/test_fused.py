"""A decode step in one call does what the layers do one by one."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.backends.cpu import native
from workers.backends.cpu.build import KernelBuildError, load_library
from workers.backends.cpu.native import FEW_ROWS, CpuBackend
from workers.backends.reference import ReferenceBackend
from workers.budget.kv_format import RECENT_TOKENS
from workers.budget.pages import PAGE_TOKENS, pages_for
from workers.execute.decode import DecodeAttend
from workers.kv.pool import PagedLayers, PagedStep
from workers.kv.rows import decode, encode
from workers.model.config import ModelConfig
from workers.model.llama import LlamaStage
from workers.model.shapes import SHAPES

LAYERS = 3
MODEL = dataclasses.replace(
    SHAPES["toy"],
    layers=LAYERS,
    hidden=48,
    heads=6,
    kv_heads=2,
    head_size=16,
    intermediate=80,
    vocabulary=30,
    context=1024,
    eos_ids=(),
)


@pytest.fixture(scope="module", params=[False, True], ids=["fp32 products", "bf16 products"])
def native_for(request: pytest.FixtureRequest) -> Callable[[torch.dtype], CpuBackend]:
    """Kernels as on a processor that does, or does not, multiply bf16."""
    try:
        library = load_library()
    except KernelBuildError as error:
        pytest.skip(f"no native kernels here: {error}")

    def make(dtype: torch.dtype) -> CpuBackend:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "multiplies_bf16", lambda _: request.param)
            return CpuBackend(library, dtype)

    return make


def step_for(seed: int, lengths: list[list[int]], model: ModelConfig, dtype: torch.dtype) -> PagedStep:
    """Caches of these lengths, [layers][sequences], with the new token, on pages in any order."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.tensor(lengths, dtype=torch.int32)
    width = pages_for(int(every.max()))
    order = torch.randperm(every.numel() * width, generator=generator)
    pages = order.view(*every.shape, width).to(torch.int32)
    shape = (order.numel() * PAGE_TOKENS, 2, model.kv_heads, model.head_size)
    last = every.long() - 1
    slots = pages.gather(2, (last // PAGE_TOKENS)[..., None])[..., 0] * PAGE_TOKENS + last % PAGE_TOKENS
    rows = encode(torch.randn(shape, generator=generator), dtype)
    return PagedStep(rows, slots.long(), pages, every)


def with_recent(step: PagedStep, seed: int, model: ModelConfig) -> PagedStep:
    """``step`` with the newest tokens in int8 too, as many as there are at most, on pages of eight."""
    generator = torch.Generator().manual_seed(seed)
    counts = step.lengths.clamp(max=RECENT_TOKENS)
    starts = torch.randint(8, counts.shape, generator=generator, dtype=torch.int32)
    pages = torch.randperm(counts.numel() * 6, generator=generator).view(*counts.shape, 6).to(torch.int32)
    last = (starts + counts).long() - 1
    slots = pages.gather(2, (last // 8)[..., None])[..., 0] * 8 + last % 8
    shape = (pages.numel() * 8, 2, model.kv_heads, model.head_size)
    rows = encode(torch.randn(shape, generator=generator), torch.int8)
    recent = PagedLayers(rows, pages, starts + counts, starts, page_tokens=8)
    return dataclasses.replace(step, recent=recent, recent_slots=slots.long())


def within_reach(step: PagedStep) -> PagedStep:
    """``step`` with none of the newest tokens twice that a window leaves out."""
    if step.recent is None or step.recent.starts is None or step.starts is None:
        return step
    first = step.recent.lengths - (step.lengths - step.starts)
    starts = step.recent.starts.maximum(first)
    return dataclasses.replace(step, recent=dataclasses.replace(step.recent, starts=starts))


@settings(max_examples=examples(30))
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 40) | st.integers(1, 600), min_size=1, max_size=5),
    shrink=st.integers(0, 30),
    heads=st.sampled_from([(6, 2), (4, 4), (5, 1)]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tail=st.integers(0, 40),
    spilled=st.sampled_from([0, 0, 7, 290]),
    family=st.booleans(),
    stored=st.sampled_from([None, None, torch.float16, torch.int8, torch.uint8]),
)
def test_one_call_is_all_layers_one_by_one(
    native_for: Callable[[torch.dtype], CpuBackend],
    seed: int,
    lengths: list[int],
    shrink: int,
    heads: tuple[int, int],
    biased: bool,
    dtype: torch.dtype,
    tail: int,
    spilled: int,
    family: bool,
    stored: torch.dtype | None,
) -> None:
    model = dataclasses.replace(
        MODEL, heads=heads[0], kv_heads=heads[1], attention_bias=biased, output_bias=biased, mlp_bias=biased
    )
    if family:
        model = dataclasses.replace(model, head_norms=True, unrotated=(1,))
    if stored == torch.uint8:  # whole vectors of pairs
        model = dataclasses.replace(model, head_size=32)
    kernels = native_for(dtype)
    torch.manual_seed(seed)
    stage = LlamaStage(model, 0, LAYERS, kernels).requires_grad_(False)
    for parameter in stage.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    plain = LlamaStage(model, 0, LAYERS, ReferenceBackend(torch.float32)).requires_grad_(False)
    stage.to(dtype)
    plain.load_state_dict(stage.state_dict())
    fused = kernels.fuse(stage.weights(), model, stored or dtype)
    assert fused is not None
    per_layer = [[max(1, length - layer * shrink) for length in lengths] for layer in range(LAYERS)]
    ours, theirs = (step_for(seed, per_layer, model, stored or dtype) for _ in range(2))
    if stored == torch.uint8:
        ours, theirs = (with_recent(each, seed, model) for each in (ours, theirs))
    if spilled:
        counts = [[1 + spilled * (layer + row) for row in range(len(lengths))] for layer in range(LAYERS)]
        there = step_for(seed + 1, counts, model, dtype)
        for step, kind in ((ours, dtype), (theirs, torch.float32)):
            own = PagedLayers(there.rows.to(kind), there.pages, there.lengths)
            object.__setattr__(step, "spilled", own)
    if family:
        ours, theirs = (
            dataclasses.replace(
                step,
                starts=(step.lengths // 3 * torch.tensor([[1], [0], [2]])).to(torch.int32),
                spilled=step.spilled
                and dataclasses.replace(step.spilled, starts=step.spilled.lengths * 3 // 4),
            )
            for step in (ours, theirs)
        )
        ours, theirs = map(within_reach, (ours, theirs))
    if stored is None:
        theirs = dataclasses.replace(theirs, rows=theirs.rows.float())
    tokens = torch.randint(model.vocabulary, (len(lengths),))
    angles = torch.randn(len(lengths), model.head_size // 2)
    rotation = (angles.cos(), angles.sin())
    attend = DecodeAttend(theirs, tail, ReferenceBackend(torch.float32))
    expected = plain(tokens, rotation, attend)
    hidden, shares = fused(stage.embed(tokens), rotation, ours, tail)
    # Where what is stored is rounded, the last bit of a sum may decide how.
    tolerance = 2e-4 if dtype == torch.float32 and stored is None else 5e-2
    # What was stored, and nothing else, has changed.
    places = [(ours.rows, theirs.rows)]
    if ours.recent and theirs.recent:
        places.append((ours.recent.rows, theirs.recent.rows))
    kept = [(decode(own).float(), decode(other).float()) for own, other in places]
    for got, wanted in ((hidden, expected), (shares, torch.stack(attend.shares)), *kept):
        # Roundings add up along a row: an element is as exact as the largest.
        largest = wanted.abs().max() if wanted.numel() else 0.0
        assert (got.float() - wanted).abs().lt(tolerance * max(1.0, float(largest))).all()


def test_sizes_of_no_whole_vectors_are_left_to_the_layers(
    native_for: Callable[[torch.dtype], CpuBackend],
) -> None:
    kernels = native_for(torch.float32)
    for model in (
        dataclasses.replace(MODEL, head_size=8),
        dataclasses.replace(MODEL, intermediate=81),
        dataclasses.replace(MODEL, hidden=50),
    ):
        stage = LlamaStage(model, 0, LAYERS, kernels).requires_grad_(False)
        assert kernels.fuse(stage.weights(), model, torch.float32) is None
    whole = LlamaStage(MODEL, 0, LAYERS, kernels).requires_grad_(False)
    fused = kernels.fuse(whole.weights(), MODEL, torch.float32)
    assert fused is not None
    assert fused.max_rows == FEW_ROWS
