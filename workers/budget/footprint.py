"""How many pages sequences hold: known in advance, as counts do not depend on content. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyramidserve.types import StageState
from workers.budget.kv_format import KV_FORMATS, KVFormat
from workers.budget.kv_share import KVShare
from workers.budget.pages import PAGE_TOKENS, Tokens, pages_for
from workers.budget.plan import KeepPlan

Counts = npt.NDArray[np.int64]
# Keys alone, where a token's values are not stored with them.
KEYS_PER_PAGE = 2 * PAGE_TOKENS


@dataclass(frozen=True)
class ShardLayout:
    """What decides how many pages a sequence takes on a shard with layers ``first`` to ``end``.

    ``kv_dtype`` is the device's, ``page_bytes`` its pages'; ``host_kv_dtype`` the host's, "": the same.
    """

    first: int
    end: int
    page_bytes: int
    kv_heads: int = 1
    kv_dtype: str = "float32"
    host_kv_dtype: str = ""

    @property
    def kv_format(self) -> KVFormat:
        """In which a token's KV lies on its pages."""
        return KV_FORMATS[self.kv_dtype]

    @property
    def head_size(self) -> int:
        """Numbers of a key of one head."""
        return self.kv_format.head_size(self.page_bytes // (2 * PAGE_TOKENS * self.kv_heads))

    @property
    def kv_share(self) -> KVShare:
        """What tokens take there of their bytes in 16 bits."""
        return KVShare.of(self.kv_format, self.head_size)

    @property
    def host_page_bytes(self) -> int:
        """Bytes of a page of the host's."""
        if not self.mirrors:
            return self.page_bytes
        return KV_FORMATS[self.host_kv_dtype].page_bytes(self.kv_heads, self.head_size)

    @property
    def mirrors(self) -> bool:
        """Whether the host has another format, and all tokens of sequences that are verified over it."""
        return self.host_kv_dtype not in ("", self.kv_dtype)

    def pages_on_host(self, pages: int) -> int:
        """Pages of the host that so many ``pages`` of the device take at most, layer by layer."""
        if not (self.mirrors and pages):
            return pages
        return -(-pages * self.page_bytes // self.host_page_bytes) + self.end - self.first

    @property
    def recent_pages(self) -> int:
        """Pages in which a sequence has its newest tokens in a finer format, too."""
        return (self.end - self.first) * self.kv_format.recent_pages


def stage_layout(stage: StageState) -> ShardLayout:
    """The layout of a shard as it tells of itself."""
    return ShardLayout(
        *(stage.first_layer, stage.end_layer, stage.page_bytes),
        *(stage.kv_heads, stage.kv_dtype, stage.host_kv_dtype),
    )


def index_rows(spilled: Tokens, form: KVFormat) -> Tokens:
    """Rows of a pool of such a format for the index of so many keys of a layer, and what scales them."""
    return (spilled > 0) * form.index_scale_rows + -(-spilled // form.keys_per_row)


def score_rows(plan: KeepPlan, kv_heads: int) -> int:
    """Rows of scores that each layer keeps, each of ``score_width``."""
    return kv_heads if plan.accumulates_each else 1


def score_pages(plan: KeepPlan, layout: ShardLayout) -> int:
    """Pages that hold a sequence's scores, fp32, on the shard."""
    rows = score_rows(plan, layout.kv_heads) * (layout.end - layout.first)
    return floats_pages(plan.score_width * rows, layout.page_bytes)


def sink_pages(plan: KeepPlan, layout: ShardLayout) -> int:
    """Pages that hold the first tokens' keys as they were first stored, where these move in the cache."""
    return -(-plan.moved_sinks * (layout.end - layout.first) // KEYS_PER_PAGE)


def floats_pages(floats: int, page_bytes: int) -> int:
    """Pages that hold so many fp32."""
    return -(-floats * 4 // page_bytes)


class Footprints:
    """What many plans come to in pages of consecutive shards: a row for each plan.

    Every count of pages is made here; what there is for one plan is a table of one row.
    """

    def __init__(self, shards: Sequence[ShardLayout], rows: int) -> None:
        """For at most so many plans at once."""
        self._shards = tuple(shards)
        self._layers = slice(shards[0].first, shards[-1].end)
        self._format = shards[0].kv_format
        self._firsts = [shard.first - shards[0].first for shard in shards]
        layers = shards[-1].end - shards[0].first
        # Tokens kept of the prompt and dropped of each chunk, by layer.
        self._kept = np.zeros((rows, layers), dtype=np.int64)
        self._dropped = np.zeros((rows, layers), dtype=np.int64)
        self._window = np.zeros(rows, dtype=np.int64)
        self._chunk = np.ones(rows, dtype=np.int64)
        self._drafts = np.zeros(rows, dtype=np.int64)
        self._lag = np.zeros(rows, dtype=np.int64)
        self._prompt = np.zeros(rows, dtype=np.int64)
        self._indexes = np.zeros(rows, dtype=bool)
        self._fixed = np.zeros((rows, len(shards)), dtype=np.int64)

    def set(self, row: int, plan: KeepPlan) -> None:
        """Puts ``plan`` into a row."""
        generation = plan.generation
        self._kept[row] = plan.kept[self._layers]
        self._dropped[row] = (
            0 if generation is None else generation.chunk - np.array(generation.keeps[self._layers])
        )
        self._window[row] = 0 if generation is None else generation.window
        self._chunk[row] = 1 if generation is None else generation.chunk
        self._drafts[row], self._lag[row] = plan.drafts, plan.lag
        self._prompt[row], self._indexes[row] = plan.prompt_tokens, plan.indexes
        self._fixed[row] = [
            score_pages(plan, shard) + shard.recent_pages + sink_pages(plan, shard)
            for shard in self._shards
        ]

    def pages(self, rows: Sequence[int], generated: Counts, coming: Counts | int = 0) -> Counts:
        """The most pages behind a step, ``generated`` of whose tokens are verified: [rows, shards].

        With ``coming`` tokens more that are not compressed yet. A shard learns with the next step what has
        been verified, and compresses only then; an index is filled before the pages of its tokens are free.
        """
        unverified = self._drafts[rows] + coming
        tokens = self._tokens(rows, generated, self._lag[rows]) + unverified[:, None]
        each = pages_for(tokens) + self._index_pages(rows, generated + unverified)
        held: Counts = self._by_shard(each) + self._fixed[rows]
        return held

    def pages_to_go_on(self, row: int, generated: int, heir: int) -> Counts:
        """The most pages while ``heir`` takes over, layer by layer, what ``row`` left: [1, shards]."""
        now, nothing = np.array([generated]), np.array([0])
        tokens = [
            self._tokens([each], fed, self._lag[[each]]) + self._drafts[each]
            for each, fed in ((row, now), (heir, nothing))
        ]
        index = [
            self._index_pages([each], fed + self._drafts[each])
            for each, fed in ((row, now), (heir, nothing))
        ]
        each = np.maximum(*map(pages_for, tokens)) + np.maximum(*index)
        held: Counts = self._by_shard(each) + np.maximum(self._fixed[row], self._fixed[heir])
        return held

    def spilled_pages(self, row: int, generated: int) -> Counts:
        """Pages of all that is not on the device: [shards]."""
        pages: Counts = self._by_shard(pages_for(self._spilled([row], np.array([generated]))))[0]
        return pages

    def _tokens(self, rows: Sequence[int], generated: Counts, late: Counts | int) -> Counts:
        """On the device, by layer, where compression is ``late`` by so many tokens: [rows, layers]."""
        chunks = np.maximum(generated - late - self._window[rows], 0) // self._chunk[rows]
        tokens: Counts = self._kept[rows] + generated[:, None] - chunks[:, None] * self._dropped[rows]
        return tokens

    def _spilled(self, rows: Sequence[int], generated: Counts) -> Counts:
        """Not on the device, by layer, once all is compressed that can be: [rows, layers]."""
        return (self._prompt[rows] + generated)[:, None] - self._tokens(rows, generated, 0)

    def _index_pages(self, rows: Sequence[int], generated: Counts) -> Counts:
        """Of the keys of what is spilled, by layer: [rows, layers]."""
        keys = index_rows(self._spilled(rows, generated), self._format)
        pages: Counts = self._indexes[rows][:, None] * pages_for(keys)
        return pages

    def _by_shard(self, each: Counts) -> Counts:
        pages: Counts = np.add.reduceat(each, self._firsts, axis=1)
        return pages


def pages_held(plan: KeepPlan, layout: ShardLayout, generated: int) -> int:
    """Pages that a sequence holds on the shard with ``generated`` tokens fed."""
    return int(_alone(plan, (layout,)).pages([0], np.array([generated]))[0, 0])


def host_pages(plan: KeepPlan, layout: ShardLayout, max_tokens: int) -> int:
    """Pages of host memory that must be there for what a sequence spills until it has ``max_tokens``."""
    if not plan.spills_all:
        return 0
    if plan.drafts and layout.mirrors:
        tokens = plan.prompt_tokens + max_tokens + plan.drafts
        return int(pages_for(tokens)) * (layout.end - layout.first)
    return int(_alone(plan, (layout,)).spilled_pages(0, max_tokens - 1)[0])


def peak_pages(plan: KeepPlan, layout: ShardLayout, max_tokens: int) -> int:
    """The most pages that a sequence holds on the shard until it has ``max_tokens`` output tokens."""
    return lifetime_pages(plan, (layout,), (max_tokens,))[1][0]


def lifetime_pages(
    plan: KeepPlan, shards: tuple[ShardLayout, ...], max_tokens: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Pages of each shard behind a sequence's prefill, and the most until it has so many output tokens.

    The last output token is never fed back, so it takes no room. Layers are compressed together, so
    the peak lies at the end or just before the last chunk is compressed.
    """
    moments, coming, ends = [0], [0], []
    for fed in (count - 1 for count in max_tokens):
        first, generation = len(moments), plan.generation
        moments.append(fed)
        coming.append(0)
        if generation is not None and (chunks := generation.chunks(fed - plan.lag)):
            moments.append(generation.window + chunks * generation.chunk - 1 + plan.lag)
            coming.append(1)
        ends.append(slice(first, len(moments)))
    rows = [0] * len(moments)
    pages = _alone(plan, shards).pages(rows, np.array(moments), np.array(coming))
    return tuple(tuple(pages[own].max(axis=0).tolist()) for own in (slice(0, 1), *ends))


def _alone(plan: KeepPlan, shards: tuple[ShardLayout, ...]) -> Footprints:
    footprints = Footprints(shards, 1)
    footprints.set(0, plan)
    return footprints


def fitting(
    plan: KeepPlan, shards: tuple[ShardLayout, ...], pages: Sequence[int], on_host: Sequence[int], most: int
) -> int:
    """How many sequences with ``plan``, whose output begins, find room at once.

    Args:
        pages: the pool of each shard.
        on_host: pages that each shard's host memory holds.
        most: sequences that there may be in any case.
    """
    (held, _) = lifetime_pages(plan, shards, (1,))
    spilled = [host_pages(plan, shard, 1) for shard in shards]
    needs = zip((*pages, *on_host), (*held, *spilled), strict=True)
    return min(most, *(there // need for there, need in needs if need))
