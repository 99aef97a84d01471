"""A shard's cache holds what the plan says, bit for bit, and what it evicts is on the host."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kv_doubles import DeferredLink, PoisoningAllocator, poison, same_bits
from kv_plans import plans

from pyramidserve.types import Compression
from workers.budget.footprint import ShardLayout, pages_held, peak_pages, score_pages, sink_pages
from workers.budget.pages import IntegrityError, OutOfPagesError, pages_for
from workers.budget.plan import KeepPlan
from workers.budget.released import ReleasedSequence
from workers.execute.choice import Chooser
from workers.execute.generation import Generation
from workers.kv.cache import ShardCache
from workers.kv.host import HostStore
from workers.kv.page_table import PageTables
from workers.kv.pool import KVPool
from workers.kv.rows import decode, encode, row_format, row_shape
from workers.policies.observed import best_by_attention, ends
from workers.policies.registry import plan

# The shard has the middle layers of a model, so that neither its first nor its last is the model's.
FIRST, END, MODEL_LAYERS = 1, 4, 5
LAYERS = range(END - FIRST)
MAX_TOKENS, SEQUENCES = 160, 4
TOKEN = (2, 2, 4)

PYRAMID = {
    "recent_ratio": 0.3,
    "min_context_length": 2,
    "distance_weight": 2.5,
    "exceed_length_to_compress": 6,
    "gen_decay_ratio": 0.3,
}
PLANS = {
    "full": plan(Compression(), 21, MODEL_LAYERS),
    "streaming": plan(Compression("streaming", parameters={"sinks": 3, "window": 20}), 30, MODEL_LAYERS),
    "streaming short": plan(
        Compression("streaming", parameters={"sinks": 4, "window": 40}), 3, MODEL_LAYERS
    ),
    "prune": plan(Compression("pyramid", "prune", parameters=PYRAMID), 40, MODEL_LAYERS),
    "evict": plan(Compression("pyramid", "evict", parameters=PYRAMID), 40, MODEL_LAYERS),
    "long chunk": plan(
        Compression("pyramid", "evict", parameters=PYRAMID | {"exceed_length_to_compress": 25}),
        10,
        MODEL_LAYERS,
    ),
    "heads": plan(Compression("h2o", kv_keep=0.4, parameters={"drop": 5}), 40, MODEL_LAYERS),
    "heads, unequal": plan(
        Compression("h2o", parameters={"tokens": [20, 9, 14, 14, 7], "drop": 1}), 30, MODEL_LAYERS
    ),
    "heads, chunks": plan(
        Compression("pyramid", "evict", parameters=PYRAMID | {"heads": "each"}), 40, MODEL_LAYERS
    ),
}


HEADS = TOKEN[1]
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)


class Books:
    """What one sequence should hold: input positions by layer and set, over the KV of every position."""

    def __init__(self, plan: KeepPlan, random: torch.Generator, dtype: torch.dtype) -> None:
        self.plan, self.sets = plan, plan.sets(HEADS)
        # What is stored, as it comes back.
        self.kv = decode(encode(torch.randn(len(LAYERS), MAX_TOKENS, *TOKEN, generator=random), dtype))
        self.device: list[list[list[int]]] = [[[] for _ in range(self.sets)] for _ in LAYERS]
        self.host: list[list[list[int]]] = [[[] for _ in range(self.sets)] for _ in LAYERS]
        # Attention that a generated token pays to a position, for each head.
        self.attention = np.zeros((len(LAYERS), HEADS, MAX_TOKENS, MAX_TOKENS))
        self.stored = self.suspended = False
        self.generated = 0
        self.peak = 0

    @property
    def end(self) -> int:
        return self.plan.prompt_tokens + self.generated

    def rows(self, layer: int, held: list[list[int]]) -> torch.Tensor:
        """KV of ``held``, of which each head has its own."""
        each = held * (HEADS // len(held))
        return torch.stack([self.kv[layer, own, :, head] for head, own in enumerate(each)], dim=2)

    def lengths(self) -> list[int]:
        """Tokens of each layer on the device."""
        return [len(held[0]) for held in self.device]

    def note_peak(self, layout: ShardLayout) -> None:
        held = fixed_pages(self.plan, layout) + sum(map(pages_for, self.lengths()))
        self.peak = max(self.peak, held)

    def compress(self, layer: int, chosen: list[list[int]]) -> None:
        """Moves what is lost that is due to go; ``chosen`` is what the cache has decided to hold."""
        for number, own in enumerate(chosen):
            self._compress_set(layer, number, own)

    def _compress_set(self, layer: int, number: int, chosen: list[int]) -> None:
        generation, held = self.plan.generation, self.device[layer][number]
        assert generation is not None
        if generation.rechooses:
            candidates, keeps = held[generation.sinks :], len(held) - generation.sinks - generation.chunk
            stays = candidates[len(candidates) - generation.recent :]
            looking = slice(0, self.generated)
            weights = np.ones(self.generated)
        else:
            first = self.end - generation.window - generation.chunk
            candidates, keeps = (
                list(range(first, first + generation.chunk)),
                generation.keeps[FIRST + layer],
            )
            stays = []
            looking = slice(self.generated - generation.window, self.generated)
            newest = generation.accumulates.newest if generation.accumulates else 1
            weights = np.linspace(1, newest, generation.window)
        kept = [position for position in candidates if position in chosen]
        gone = [position for position in candidates if position not in chosen]
        assert len(kept) == keeps
        assert set(stays) <= set(kept)
        if not generation.accumulates:
            assert gone == candidates[: len(gone)]
        elif set(kept) - set(stays) and gone:
            paid = np.tensordot(weights, self.attention[layer][:, looking], axes=(0, 1))
            over = {"each": lambda: paid[number], "mean": lambda: paid.mean(0), "max": lambda: paid.max(0)}
            scores = over[self.plan.heads]()
            assert scores[sorted(set(kept) - set(stays))].min() > scores[gone].max() - 1e-3
        self.device[layer][number] = [position for position in held if position not in gone]
        self.host[layer][number] += gone


class Shard:
    """A shard's cache in poisoned memory, its copies late, beside the books of its sequences."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        pages: int = 200,
        host_pages: int = 200,
        host_dtype: torch.dtype | None = None,
    ) -> None:
        pool = KVPool(pages, *TOKEN[1:], dtype, torch.device("cpu"))
        pool.allocator = PoisoningAllocator(pages, pool.rows)
        like = torch.empty(0, *row_shape(*TOKEN[1:], host_dtype or dtype), dtype=host_dtype or dtype)
        names = (row_format(dtype).name, row_format(like.dtype).name)
        self.layout = ShardLayout(FIRST, END, pool.page_bytes, HEADS, *names)
        self.link = DeferredLink()
        self.tables = PageTables(pool.allocator, SEQUENCES, len(LAYERS), MAX_TOKENS)
        sizes = (2 * SEQUENCES, len(LAYERS), 2 * MAX_TOKENS)
        room = host_pages * self.layout.host_page_bytes
        host = poison(HostStore(room, self.link, *sizes, like=like))
        self.cache = ShardCache(pool, self.tables, host, self.layout)
        self.generation = Generation(self.cache, self.layout, [None] * len(LAYERS))
        self.allocator, self.dtype = pool.allocator, dtype
        self.books: dict[int, Books] = {}
        self.random = torch.Generator().manual_seed(7)

    def open(self, sequence: int, plan: KeepPlan) -> Books:
        by_attention = plan.generation is not None and plan.generation.accumulates is not None
        choose = best_by_attention if by_attention else ends
        chooser = Chooser(sequence, lambda observed, tokens, keep: choose(observed, tokens, keep, None))
        self.generation.open(sequence, plan, chooser)
        self.books[sequence] = Books(plan, self.random, self.dtype)
        self.books[sequence].note_peak(self.layout)
        return self.books[sequence]

    def store(self, sequence: int) -> None:
        """Stores a prompt, keeping any tokens; a plan that prunes has dropped the others before."""
        books = self.books[sequence]
        tokens = books.plan.prompt_tokens
        for layer in LAYERS:
            kept = books.plan.kept[FIRST + layer]
            sets = [torch.randperm(tokens, generator=self.random)[:kept] for _ in range(books.sets)]
            chosen = torch.stack(sets).sort(dim=1).values
            alive = chosen[0] if books.plan.drops_hidden_states else torch.arange(tokens)
            self.cache.store_prompt(
                sequence,
                layer,
                alive.numpy().astype(np.int32),
                books.kv[layer, alive],
                None if len(alive) == kept else chosen.numpy(),
            )
            books.device[layer] = chosen.tolist()
            books.host[layer] = [sorted({*alive.tolist()} - {*own}) for own in chosen.tolist()]
        books.stored = True
        books.note_peak(self.layout)

    def decode(self, sequences: Sequence[int]) -> None:
        """Generates a token of each sequence, with random attention and NaN where there is none."""
        cache, all_books = self.cache, [self.books[sequence] for sequence in sequences]
        targets = self.generation.targets(sequences)
        step = cache.extend(sequences)
        tail = targets.tail if targets else 0
        shares = torch.rand(len(LAYERS), len(sequences), HEADS, tail, generator=self.random)
        for layer, attention in zip(LAYERS, shares, strict=True):
            batch = step.write(layer, torch.stack([b.kv[layer, b.end] for b in all_books]))
            lengths = batch.lengths
            gathered = decode(batch.gather(0, len(sequences), int(lengths.max())))
            attended, _ = batch.gather_all(0, len(sequences), int(lengths.max()), 0, gathered.dtype)
            lacking = torch.arange(tail) < tail - lengths[:, None]
            attention.masked_fill_(lacking[:, None], float("nan"))
            for row, books in enumerate(all_books):
                held = books.device[layer]
                for own in held:
                    own.append(books.end)
                assert same_bits(gathered[row, : lengths[row]], books.rows(layer, held))
                # The newest in a finer format, whatever else has been cut.
                whole = attended[row, : lengths[row]]
                assert torch.allclose(whole, books.rows(layer, held), atol=0.02)
                for head, own in enumerate(held * (HEADS // len(held)) if tail else []):
                    newest = own[-tail:]
                    paid = attention[row, head, tail - len(newest) :]
                    books.attention[layer, head, books.generated, newest] = paid
            assert not gathered.isnan().any()
        if targets is not None:
            self.generation.add_scores(sequences, targets, shares)
        for books in all_books:
            books.note_peak(self.layout)
        self.generation.fed(sequences)
        for sequence, books in zip(sequences, all_books, strict=True):
            books.generated += 1
            generation = books.plan.generation
            behind = books.generated - generation.window if generation else 0
            if generation and behind > 0 and behind % generation.chunk == 0:
                for layer in LAYERS:
                    books.compress(layer, cache.positions(sequence, layer).tolist())

    def check(self) -> None:
        """Asserts that pages, lengths, positions and bits are what plan and books say."""
        self.cache.check_integrity()
        assert len(self.cache) == len(self.books)
        expected = 0
        for sequence, books in self.books.items():
            assert sequence in self.cache
            if not books.stored:
                expected += fixed_pages(books.plan, self.layout)
                continue
            expected += 0 if books.suspended else pages_held(books.plan, self.layout, books.generated)
            for layer in LAYERS:
                held = books.device[layer]
                assert len(held[0]) == books.plan.tokens(FIRST + layer, books.generated)
                assert self.cache.positions(sequence, layer).tolist() == held
                if not books.suspended:
                    assert same_bits(self.cache.device.read(sequence, layer), books.rows(layer, held))
        assert self.allocator.pages_in_use == expected

    def suspend(self, sequence: int) -> bool:
        """Moves a sequence to the host; returns whether that had room beside others that are suspended."""
        wanted = sum(self.host_pages(key) for key, own in self.books.items() if own.suspended)
        if wanted + self.host_pages(sequence) > self.cache.host.limit_bytes // self.layout.host_page_bytes:
            with pytest.raises(IntegrityError, match="no room for suspended sequence"):
                self.cache.suspend(sequence)
            return False
        self.cache.suspend(sequence)
        self.books[sequence].suspended = True
        return True

    def resume(self, sequence: int) -> None:
        """Moves a sequence back to the device."""
        self.cache.resume(sequence)
        self.books[sequence].suspended = False

    def host_pages(self, sequence: int) -> int:
        """Pages of the host that a sequence takes there as it is on the device."""
        row, host_row = self.layout.page_bytes // 16, self.layout.host_page_bytes // 16
        rings = self.layout.kv_format.recent_pages * 16
        lengths = self.books[sequence].lengths()
        pages = sum(pages_for(-(-(length + rings) * row // host_row)) for length in lengths)
        held = self.layout.recent_pages + sum(map(pages_for, lengths))
        assert pages <= self.layout.pages_on_host(held)
        return pages

    def recall(self, sequence: int) -> bool:
        """Asserts that the host has what was evicted; returns whether it has not dropped it."""
        books, host = self.books[sequence], self.cache.host
        back = [host.read(sequence, layer) for layer in LAYERS]
        for layer, kv in enumerate(back):
            if kv is not None:
                assert host.positions(sequence, layer).tolist() == books.host[layer]
                assert same_bits(decode(kv), books.rows(layer, books.host[layer]).to(decode(kv).dtype))
        dropped = {kv is None for kv in back}
        assert len(dropped) == 1
        return dropped == {False}

    def release(self, sequence: int) -> ReleasedSequence:
        """Releases a sequence; asserts that its receipts account for every token and byte."""
        books, host = self.books.pop(sequence), self.cache.host
        spilled = [host.count(sequence, layer) for layer in LAYERS]
        before = self.allocator.pages_in_use
        self.generation.close(sequence)
        receipt = self.cache.release(sequence)
        for layer, tokens in enumerate(receipt.layers):
            held = books.device[layer]
            prompt = [sum(position < books.plan.prompt_tokens for position in own) for own in held]
            assert tokens.layer == FIRST + layer
            assert tokens.prompt_kept == round(sum(prompt) / len(prompt))
            assert tokens.generated_kept == len(held[0]) - tokens.prompt_kept
            assert tokens.spilled == spilled[layer]
            assert tokens.dropped == books.end - len(held[0]) - spilled[layer]
        row_bytes = self.layout.host_page_bytes // 16
        evicted = sum(len(own[0]) for own in books.host) * row_bytes
        assert receipt.spilled_bytes == evicted
        assert receipt.dropped_bytes == evicted - sum(spilled) * row_bytes
        assert receipt.peak_pages == books.peak
        assert receipt.page_bytes == self.layout.page_bytes
        assert receipt.table_bytes == self.tables.bytes_per_sequence
        assert receipt.score_pages == score_pages(books.plan, self.layout)
        pages = fixed_pages(books.plan, self.layout) + sum(map(pages_for, books.lengths()))
        assert before - self.allocator.pages_in_use == (0 if books.suspended else pages)
        return receipt


def fixed_pages(plan: KeepPlan, layout: ShardLayout) -> int:
    """Pages that a sequence has however many tokens it holds."""
    return score_pages(plan, layout) + sink_pages(plan, layout) + layout.recent_pages


@pytest.fixture(
    params=[(each, each) for each in DTYPES] + [(torch.int8, torch.float32), (torch.uint8, torch.float32)],
    ids=["fp32", "bf16", "int8", "int4", "int8-fp32", "int4-fp32"],
)
def shard(request: pytest.FixtureRequest) -> Shard:
    return Shard(request.param[0], host_dtype=request.param[1])


@pytest.mark.parametrize("name", ["streaming", "evict", "long chunk", "heads", "heads, unequal"])
def test_what_a_prompt_keeps_and_what_it_spills_are_the_whole_prompt(name: str, shard: Shard) -> None:
    books = shard.open(1, PLANS[name])
    shard.store(1)
    shard.check()
    assert shard.recall(1)
    for device, host in zip(books.device, books.host, strict=True):
        for own, gone in zip(device, host, strict=True):
            assert sorted(own + gone) == list(range(books.plan.prompt_tokens))
    assert any(map(any, books.host))


@pytest.mark.parametrize("name", ["full", "prune", "streaming short"])
def test_a_prompt_that_keeps_all_its_rows_spills_none(name: str, shard: Shard) -> None:
    books = shard.open(1, PLANS[name])
    shard.store(1)
    shard.check()
    assert shard.link.pending == shard.cache.host.bytes_in_use == 0
    kept = books.plan.kept[FIRST:END]
    assert [shard.cache.positions(1, layer).shape[1] for layer in LAYERS] == list(kept)


@pytest.mark.parametrize("name", PLANS)
def test_every_generated_token_leaves_what_the_plan_says(name: str, shard: Shard) -> None:
    books = shard.open(1, PLANS[name])
    shard.store(1)
    for generated in range(1, 90):
        shard.decode([1])
        shard.check()
        assert books.peak <= peak_pages(books.plan, shard.layout, generated + 1)
    assert shard.recall(1)
    receipt = shard.release(1)
    assert receipt.peak_pages == peak_pages(books.plan, shard.layout, 90)
    assert receipt.recalled_bytes == receipt.spilled_bytes
    assert shard.allocator.pages_in_use == shard.cache.host.bytes_in_use == 0


def test_sequences_of_all_lengths_and_policies_share_a_batch(shard: Shard) -> None:
    for sequence, name in enumerate(("prune", "streaming short", "full", "evict")):
        shard.open(sequence, PLANS[name])
        shard.store(sequence)
        for _ in range(12):
            shard.decode(list(shard.books)[::-1])
    shard.check()
    lengths = [length for books in shard.books.values() for length in books.lengths()]
    assert len({*lengths}) > 6
    assert all(map(shard.recall, shard.books))


@pytest.mark.parametrize(
    ("name", "sinks", "chunk_is_due"), [("streaming", 3, 16), ("streaming short", 4, 57)]
)
def test_streaming_drops_the_oldest_behind_the_sinks(
    name: str, sinks: int, chunk_is_due: int, shard: Shard
) -> None:
    books = shard.open(1, PLANS[name])
    shard.store(1)
    (held,) = shard.cache.positions(1, 0).tolist()
    held += range(books.end, books.end + chunk_is_due)
    for _ in range(chunk_is_due):
        shard.decode([1])
    assert shard.cache.positions(1, 0).tolist() == [held[:sinks] + held[sinks + 16 :]]


def test_a_step_without_a_complete_chunk_behind_it_needs_no_scores() -> None:
    shard = Shard()
    for sequence, name in enumerate(("evict", "full", "streaming")):
        shard.open(sequence, PLANS[name])
        shard.store(sequence)
    wanted = []
    for _ in range(7):
        wanted.append(shard.generation.targets([0, 1, 2]) is not None)
        shard.decode([0, 1, 2])
    assert wanted == [False] * 6 + [True]
    assert shard.generation.targets([1, 2]) is None


@pytest.mark.parametrize("name", PLANS)
def test_a_sequence_that_was_suspended_goes_on_as_if_it_had_not_been(name: str, shard: Shard) -> None:
    books = shard.open(1, PLANS[name])
    shard.store(1)
    for step in range(1, 60):
        shard.decode([1])
        if step % 7 == 0:
            assert shard.suspend(1)
            assert shard.allocator.pages_in_use == 0
            # Somebody else has the pages in the meantime.
            shard.open(2, PLANS["evict"])
            shard.store(2)
            shard.check()
            shard.release(2)
            shard.resume(1)
        shard.check()
    assert shard.recall(1)
    receipt = shard.release(1)
    assert receipt.peak_pages == books.peak
    assert shard.allocator.pages_in_use == shard.cache.host.bytes_in_use == 0


def test_a_host_without_room_leaves_a_sequence_where_it_is() -> None:
    shard = Shard(host_pages=2)
    shard.open(1, PLANS["full"])
    shard.store(1)
    assert not shard.suspend(1)
    shard.check()
    shard.decode([1])


def test_a_suspended_sequence_can_be_released() -> None:
    shard = Shard()
    for sequence in (1, 2):
        shard.open(sequence, PLANS["evict"])
        shard.store(sequence)
    shard.decode([1, 2])
    assert shard.suspend(1)
    shard.release(1)
    shard.check()
    shard.decode([2])


def test_evicted_tokens_outlive_the_pages_they_came_from(shard: Shard) -> None:
    shard.open(1, PLANS["evict"])
    shard.store(1)
    for _ in range(60):
        shard.decode([1])
    assert shard.link.pending > 0
    for layer in LAYERS:
        shard.tables.resize(1, layer, 0)
    assert shard.recall(1)


def test_what_the_host_drops_is_accounted_as_dropped() -> None:
    shard = Shard(host_pages=2)
    shard.open(1, PLANS["evict"])
    shard.store(1)
    for _ in range(60):
        shard.decode([1])
    assert not shard.recall(1)
    receipt = shard.release(1)
    assert receipt.dropped_bytes == receipt.spilled_bytes > 0
    assert all(layer.spilled == 0 < layer.dropped for layer in receipt.layers)


def test_a_sequence_released_before_its_prompt_was_stored_held_scores_alone() -> None:
    shard = Shard()
    shard.open(1, PLANS["evict"])
    receipt = shard.release(1)
    assert receipt.peak_pages == receipt.score_pages > 0
    assert all(layer.dropped == 40 for layer in receipt.layers)


def test_a_sequence_whose_scores_find_no_page_changes_nothing() -> None:
    wanted = score_pages(PLANS["evict"], Shard().layout)
    shard = Shard(pages=wanted - 1)
    with pytest.raises(OutOfPagesError):
        shard.open(1, PLANS["evict"])
    shard.check()
    assert 1 not in shard.cache
    assert shard.allocator.pages_in_use == 0


@pytest.mark.parametrize(
    "tamper",
    [
        lambda shard: shard.allocator.allocate(1, "nobody"),
        lambda shard: shard.tables.resize(1, 0, 1),
        lambda shard: shard.cache._sequences[1].positions[0].__setitem__((0, 3), 0),
        lambda shard: shard.cache.host._sequences[1].positions.reverse(),
        lambda shard: shard.cache.device.scores._pages.__setitem__(1, np.zeros(0, dtype=np.int32)),
    ],
    ids=["a page of nobody", "lost tokens", "positions", "host", "scores"],
)
def test_tampered_books_are_found(tamper: Callable[[Shard], object]) -> None:
    shard = Shard()
    shard.open(1, PLANS["evict"])
    shard.store(1)
    shard.check()
    tamper(shard)
    with pytest.raises(IntegrityError):
        shard.cache.check_integrity()


class Caches(RuleBasedStateMachine):
    """Sequences of any plan come, grow together in any batches, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.shard = Shard(pages=0)
        self.most: dict[int, int] = {}
        self.begun = 0

    @initialize(
        dtype=st.sampled_from(DTYPES),
        host_dtype=st.sampled_from((None, None, torch.float32)),
        pages=st.integers(16, 100),
        host_pages=st.integers(0, 40),
    )
    def build(
        self, dtype: torch.dtype, host_dtype: torch.dtype | None, pages: int, host_pages: int
    ) -> None:
        self.shard = Shard(dtype, pages, host_pages, host_dtype)

    def _peaks(self) -> int:
        """Pages that admission has promised."""
        books, layout = self.shard.books, self.shard.layout
        return sum(peak_pages(books[key].plan, layout, most) for key, most in self.most.items())

    @precondition(lambda self: len(self.most) < SEQUENCES)
    @rule(plan=plans(MODEL_LAYERS, 40), most=st.integers(1, 100))
    def open(self, plan: KeepPlan, most: int) -> None:
        peak = peak_pages(plan, self.shard.layout, most)
        if self._peaks() + peak <= self.shard.allocator.pages:
            self.begun += 1
            self.shard.open(self.begun, plan)
            self.most[self.begun] = most

    @precondition(lambda self: not all(books.stored for books in self.shard.books.values()))
    @rule()
    def store(self) -> None:
        self.shard.store(next(key for key, own in self.shard.books.items() if not own.stored))

    def _active(self) -> list[int]:
        """Those that have a prompt on the device."""
        return [key for key, own in self.shard.books.items() if own.stored and not own.suspended]

    def _growing(self) -> list[int]:
        books = self.shard.books
        return [key for key in self._active() if books[key].generated < self.most[key] - 1]

    @precondition(lambda self: self._growing())
    @rule(steps=st.integers(1, 40), batch=st.integers(1, SEQUENCES), data=st.data())
    def decode(self, steps: int, batch: int, data: st.DataObject) -> None:
        sequences = data.draw(st.permutations(self._growing()))[:batch]
        left = [self.most[key] - 1 - self.shard.books[key].generated for key in sequences]
        for _ in range(min(steps, *left)):
            self.shard.decode(sequences)
            self.shard.check()

    @precondition(lambda self: self._active())
    @rule(data=st.data())
    def suspend(self, data: st.DataObject) -> None:
        self.shard.suspend(data.draw(st.sampled_from(self._active())))

    @precondition(lambda self: any(own.suspended for own in self.shard.books.values()))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        suspended = [key for key, own in self.shard.books.items() if own.suspended]
        self.shard.resume(data.draw(st.sampled_from(suspended)))

    @rule(count=st.integers(1, 8))
    def complete_some_copies(self, count: int) -> None:
        self.shard.link.complete(count)

    @precondition(lambda self: self.shard.cache.host.bytes_in_use)
    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        self.shard.recall(data.draw(st.sampled_from(list(self.most))))

    # Not the only one that can still grow, or few would ever grow together.
    @precondition(lambda self: len(self.most) > 2 or (self.most and not self._growing()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.most)))
        most, plan = self.most.pop(sequence), self.shard.books[sequence].plan
        receipt = self.shard.release(sequence)
        assert receipt.peak_pages <= peak_pages(plan, self.shard.layout, most)

    @invariant()
    def memory_is_what_the_plans_say(self) -> None:
        self.shard.check()
        assert self.shard.allocator.pages_in_use <= self._peaks()

    def teardown(self) -> None:
        for sequence in self.most:
            self.shard.release(sequence)
        self.shard.link.complete(self.shard.link.pending)
        self.shard.check()
        self.shard.cache.host.check_integrity()
        assert self.shard.allocator.pages_in_use == self.shard.cache.host.bytes_in_use == 0


@pytest.mark.hypothesis
def test_any_sequences_in_any_batches_hold_what_their_plans_say() -> None:
    chosen = settings(Caches.TestCase.settings, max_examples=examples(30), stateful_step_count=40)
    run_state_machine_as_test(Caches, settings=chosen)
