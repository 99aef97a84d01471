"""What a sequence will take is known before it begins: against counting it token by token."""

from collections.abc import Iterator
from dataclasses import replace

from fuzz import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kv_plans import plans, pyramid_plans, streaming_plans, with_recall

from workers.budget.footprint import (
    ShardLayout,
    host_pages,
    pages_held,
    peak_pages,
    score_pages,
    sink_pages,
)
from workers.budget.kv_format import KV_FORMATS
from workers.budget.observation import RowAttention
from workers.budget.pages import PAGE_TOKENS
from workers.budget.plan import GenerationPlan, KeepPlan

LAYERS = 4
LAYOUTS = st.builds(
    lambda ends, page_bytes, kv_heads: ShardLayout(min(ends), max(ends), page_bytes, kv_heads),
    st.sets(st.integers(0, LAYERS), min_size=2, max_size=2),
    st.sampled_from((64, 256, 4096)),
    st.sampled_from((1, 3)),
)


def _lives(plan: KeepPlan, layout: ShardLayout, fed: int) -> Iterator[tuple[int, int]]:
    """After the prompt and each fed token: pages before compression, and behind it."""
    generation = plan.generation
    scores = 0
    if generation is not None and generation.observes is not None:
        scored = generation.window + generation.chunk + (max(plan.kept) if generation.rechooses else 0)
        rows = 1 if plan.heads == "mean" else layout.kv_heads
        floats = (layout.end - layout.first) * rows * scored
        scores = len(range(0, floats * 4, layout.page_bytes))

    def pages() -> int:
        return scores + sink_pages(plan, layout) + sum(len(range(0, tokens, 16)) for tokens in held)

    held = list(plan.kept[layout.first : layout.end])
    uncompressed = 0
    yield pages(), pages()
    for _ in range(fed):
        held = [tokens + 1 for tokens in held]
        uncompressed += 1
        before = pages()
        if generation is not None and uncompressed == generation.window + generation.chunk:
            uncompressed -= generation.chunk
            for index, keeps in enumerate(generation.keeps[layout.first : layout.end]):
                held[index] -= generation.chunk - keeps
        yield before, pages()


# One layer peaks before its chunk is compressed, the other, which keeps all of it, at the end.
UNEQUAL = KeepPlan(
    prompt_tokens=15,
    kept=(15, 15),
    recent=1,
    generation=GenerationPlan(32, 1, start=(15, 15), keeps=(0, 32), observes=RowAttention(1)),
)


@settings(max_examples=examples(300))
@given(plans(LAYERS, 80), LAYOUTS, st.integers(1, 150))
@example(UNEQUAL, ShardLayout(0, 2, 4096), 35)
def test_peak_pages_are_the_most_pages_ever_held(
    plan: KeepPlan, layout: ShardLayout, max_tokens: int
) -> None:
    most = max(before for before, _ in _lives(plan, layout, max_tokens - 1))
    assert peak_pages(plan, layout, max_tokens) == most


@given(plans(LAYERS, 80), LAYOUTS)
def test_pages_held_follow_every_token(plan: KeepPlan, layout: ShardLayout) -> None:
    counted = [after for _, after in _lives(plan, layout, 100)]
    assert [pages_held(plan, layout, fed) for fed in range(101)] == counted


@given(with_recall(plans(LAYERS, 80)), LAYOUTS, st.integers(0, 120))
@example(replace(UNEQUAL, drafts=7, indexes=True), ShardLayout(0, 2, 4096), 40)
def test_drafts_and_indexes_are_counted_at_the_most_that_they_may_be(
    plan: KeepPlan, layout: ShardLayout, fed: int
) -> None:
    """A step may bring ``drafts`` more, compresses what the one before has verified, and may index them."""
    verified_before = max(0, fed - (plan.drafts + 1 if plan.drafts else 0))
    pages = score_pages(plan, layout) + sink_pages(plan, layout)
    for layer in range(layout.first, layout.end):
        tokens = plan.tokens(layer, verified_before) + fed - verified_before + plan.drafts
        most = fed + plan.drafts
        spilled = plan.prompt_tokens + most - plan.tokens(layer, most)
        rows = len(range(0, spilled, 16)) + bool(spilled) if plan.indexes else 0
        pages += len(range(0, tokens, 16)) + len(range(0, rows, 16))
    assert pages_held(plan, layout, fed) == pages
    whole = replace(plan, spills_all=True)
    assert host_pages(whole, layout, fed + 1) == sum(
        len(range(0, plan.prompt_tokens + fed - plan.tokens(layer, fed), 16))
        for layer in range(layout.first, layout.end)
    )
    assert host_pages(replace(plan, spills_all=False), layout, fed + 1) == 0


@given(pyramid_plans(LAYERS, 80), LAYOUTS)
def test_score_pages_hold_the_scores_and_no_page_more(plan: KeepPlan, layout: ShardLayout) -> None:
    rows = layout.kv_heads if plan.heads != "mean" else 1
    wanted = plan.score_width * rows * (layout.end - layout.first) * 4
    room = score_pages(plan, layout) * layout.page_bytes
    assert room - layout.page_bytes < wanted <= room


@given(streaming_plans(LAYERS, 80), LAYOUTS)
def test_sink_pages_hold_the_sinks_keys_and_no_page_more(plan: KeepPlan, layout: ShardLayout) -> None:
    assert plan.generation is not None
    keys = plan.generation.sinks * (layout.end - layout.first)
    wanted = keys * layout.page_bytes / (2 * PAGE_TOKENS)
    room = sink_pages(plan, layout) * layout.page_bytes
    assert room - layout.page_bytes < wanted <= room
    assert sink_pages(replace(plan, within_cache=False), layout) == 0


@given(plans(LAYERS, 80).filter(lambda plan: not plan.generation or not plan.generation.accumulates))
def test_a_plan_that_chooses_nothing_by_attention_takes_no_score_page(plan: KeepPlan) -> None:
    assert score_pages(plan, ShardLayout(0, LAYERS, 64)) == 0


@given(plans(LAYERS, 60), st.integers(1, 200))
def test_a_host_in_another_format_has_room_for_all_tokens_of_what_is_verified_there(
    plan: KeepPlan, most: int
) -> None:
    head_size, heads = 64, 3
    int8, wide = KV_FORMATS["int8"], KV_FORMATS["float32"]
    layout = ShardLayout(1, 3, int8.page_bytes(heads, head_size), heads, "int8", "float32")
    assert layout.host_page_bytes == wide.page_bytes(heads, head_size)
    same = replace(layout, host_kv_dtype="int8")
    assert same.host_page_bytes == replace(layout, host_kv_dtype="").host_page_bytes == layout.page_bytes
    tokens = plan.prompt_tokens + most + plan.drafts
    if plan.drafts:
        assert (
            host_pages(plan, layout, most) == 2 * len(range(0, tokens, 16)) >= host_pages(plan, same, most)
        )
    else:
        assert host_pages(plan, layout, most) == host_pages(plan, same, most)
    assert same.pages_on_host(most) == most
    assert layout.pages_on_host(most) * layout.host_page_bytes >= most * layout.page_bytes
    assert layout.pages_on_host(0) == 0
