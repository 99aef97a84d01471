"""What a sequence will take of a shard's pool: known in advance, as counts do not depend on content."""

from dataclasses import dataclass

from workers.compression.plan import KeepPlan
from workers.kv.pages import Tokens, pages_for


@dataclass(frozen=True)
class ShardLayout:
    """What decides how many pages a sequence takes on a shard with layers ``first`` to ``end``."""

    first: int
    end: int
    page_bytes: int


def index_rows(spilled: Tokens) -> Tokens:
    """Rows of the pool for the index of so many keys of a layer, 16 a row: one row scales the others."""
    return (spilled > 0) + pages_for(spilled)


def score_width(plan: KeepPlan) -> int:
    """Scores that each layer keeps for generated tokens not yet compressed."""
    generation = plan.generation
    if generation is None or not generation.scores:
        return 0
    return generation.window + generation.chunk


def score_pages(plan: KeepPlan, layout: ShardLayout) -> int:
    """Pages that hold a sequence's scores, fp32, on the shard."""
    layers = layout.end - layout.first
    return -(-score_width(plan) * layers * 4 // layout.page_bytes)


def pages_held(plan: KeepPlan, layout: ShardLayout, generated: int) -> int:
    """Pages that a sequence holds on the shard with ``generated`` tokens fed."""
    layers = range(layout.first, layout.end)
    tokens = sum(pages_for(plan.most_tokens(layer, generated)) for layer in layers)
    return score_pages(plan, layout) + index_pages(plan, layout, generated) + tokens


def index_pages(plan: KeepPlan, layout: ShardLayout, generated: int) -> int:
    """Pages that hold the index of a sequence's spilled keys on the shard."""
    if not plan.indexes:
        return 0
    return sum(
        pages_for(index_rows(plan.prompt_tokens + generated - plan.tokens(layer, generated)))
        for layer in range(layout.first, layout.end)
    )


def host_pages(plan: KeepPlan, layout: ShardLayout, max_tokens: int) -> int:
    """Pages of host memory that must be there for what a sequence spills until it has ``max_tokens``."""
    if not plan.spills_all:
        return 0
    fed = max_tokens - 1
    return sum(
        pages_for(plan.prompt_tokens + fed - plan.tokens(layer, fed))
        for layer in range(layout.first, layout.end)
    )


def peak_pages(plan: KeepPlan, layout: ShardLayout, max_tokens: int) -> int:
    """The most pages that a sequence holds on the shard until it has ``max_tokens`` output tokens.

    The last output token is never fed back, so it takes no room. Layers are compressed together, so
    the peak lies at the end or just before the last chunk is compressed.
    """
    fed = max_tokens - 1
    peak = pages_held(plan, layout, fed)
    generation = plan.generation
    if generation is not None and (chunks := generation.chunks(fed - plan.lag)):
        before = generation.window + chunks * generation.chunk - 1 + plan.lag
        layers = range(layout.first, layout.end)
        due = sum(pages_for(plan.most_tokens(layer, before) + 1) for layer in layers)
        peak = max(peak, score_pages(plan, layout) + index_pages(plan, layout, before) + due)
    return peak
