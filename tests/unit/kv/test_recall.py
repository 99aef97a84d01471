"""Turns, drafts and moves in any order, in poisoned memory: no token is lost, stale or doubled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import Phase, settings
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

from pyramidserve.types import Compression
from workers.backends.reference import ReferenceBackend
from workers.budget.footprint import ShardLayout
from workers.budget.pages import IntegrityError
from workers.execute.choice import Chooser
from workers.execute.generation import Generation
from workers.kv.cache import ShardCache
from workers.kv.entry import GatheredLayer, with_rows
from workers.kv.host import HostStore
from workers.kv.page_table import PageTables
from workers.kv.pool import KVPool
from workers.kv.rows import row_format
from workers.policies.registry import chooser, plan
from workers.recall.exact import feed
from workers.recall.new_rows import NewRows
from workers.recall.step import RECALLED_OF, BestOfHost

FIRST, END, MODEL_LAYERS, CONTEXT = 1, 3, 4, 400
LAYERS = range(END - FIRST)
TOKEN = (2, 2, 16)
SESSIONS = 3
PARAMETERS = {"min_context_length": 4, "exceed_length_to_compress": 12, "gen_decay_ratio": 0.3}
EVICT = Compression("pyramid", "evict", parameters=PARAMETERS)
H2O = Compression("h2o", parameters={"heavy_ratio": 0.2, "recent_ratio": 0.2, "drop": 5})
KINDS = {
    "full": Compression(),
    "off": EVICT,
    "turn": replace(EVICT, recall="turn"),
    "step": replace(EVICT, recall="step"),
    "exact": replace(EVICT, recall="exact"),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 30}, recall="exact"),
    "prune": replace(EVICT, prefill="prune", recall="turn"),
    "heads off": H2O,
    "heads turn": replace(H2O, recall="turn"),
    "heads step": replace(H2O, recall="step"),
    "heads exact": replace(H2O, recall="exact"),
    "heads chunk": replace(EVICT, parameters=PARAMETERS | {"heads": "each"}, recall="turn"),
    "heads prompt": Compression("snapkv", kv_keep=0.4, parameters={"window_size": 3}, recall="exact"),
}


class Session:
    """What one session's tokens are: KV of every position by layer, and hidden states that wait."""

    def __init__(self, kind: str, name: int) -> None:
        self.kind, self.name = kind, name
        self.kv: list[list[torch.Tensor]] = [[] for _ in LAYERS]
        self.hidden: list[dict[int, torch.Tensor]] = [{} for _ in range(len(LAYERS) + 1)]
        self.drafts = 0
        self.suspended = False
        self.rows = 0  # that its last turn has computed


class Recalling(RuleBasedStateMachine):
    """A shard's cache, and what it must hold."""

    @initialize(
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        mirrors=st.booleans(),
        host_pages=st.sampled_from([30, 2000]),
    )
    def build(self, dtype: torch.dtype, mirrors: bool, host_pages: int) -> None:
        host_dtype = torch.float32 if mirrors else dtype  # which has all that is in 16 bits, bit for bit
        pool = KVPool(2000, *TOKEN[1:], dtype, torch.device("cpu"))
        pool.allocator = PoisoningAllocator(2000, pool.rows)
        self.link, self.dtype = DeferredLink(), dtype
        names = (row_format(dtype).name, row_format(host_dtype).name)
        layout = ShardLayout(FIRST, END, pool.page_bytes, TOKEN[1], *names)
        sizes = (3 * SESSIONS, len(LAYERS) + 1, 2 * CONTEXT)
        self.scarce = host_pages < 100
        room, like = host_pages * layout.host_page_bytes, torch.empty(0, *TOKEN, dtype=host_dtype)
        host = poison(HostStore(room, self.link, *sizes, like=like))
        tables = PageTables(pool.allocator, SESSIONS, len(LAYERS), CONTEXT)
        self.cache = ShardCache(pool, tables, host, layout)
        self.generation = Generation(self.cache, layout, [None] * len(LAYERS))
        self.random = torch.Generator().manual_seed(3)
        self.sessions: list[Session] = []
        self.names = 0

    def _new(self, session: Session, count: int) -> list[torch.Tensor]:
        """Keys and values of ``count`` more tokens, for each layer."""
        new = torch.randn(len(LAYERS), count, *TOKEN, generator=self.random).to(self.dtype)
        for layer in LAYERS:
            session.kv[layer] += new[layer].unbind()
        return list(new)

    def _truth(self, session: Session, layer: int, positions: np.ndarray) -> torch.Tensor:
        whole = torch.stack(session.kv[layer])
        each = np.broadcast_to(positions, (TOKEN[1], positions.shape[1]))
        return torch.stack([whole[own.tolist(), :, head] for head, own in enumerate(each)], dim=2)

    def _any(self, sets: int, tokens: int, count: int) -> torch.Tensor:
        """So many of ``tokens`` tokens, for each set."""
        chosen = [torch.randperm(tokens, generator=self.random)[:count].sort().values for _ in range(sets)]
        return torch.stack(chosen)

    def _choose(self, session: Session) -> Chooser:
        return Chooser(session.name, chooser(KINDS[session.kind]))

    def _name(self) -> int:
        self.names += 1
        return self.names

    def _pick(self, data: st.DataObject, *, drafts: bool | None = None) -> Session:
        return data.draw(st.sampled_from(self._active(drafts)))

    def _active(self, drafts: bool | None = None) -> list[Session]:
        return [
            each
            for each in self.sessions
            if not each.suspended
            and len(each.kv[0]) < CONTEXT - 40
            and (drafts is None or (self.generation.plan(each.name).drafts > 0) == drafts)
        ]

    @precondition(lambda self: len(self.sessions) < SESSIONS)
    @rule(kind=st.sampled_from(sorted(KINDS)), tokens=st.integers(1, 90))
    def begin(self, kind: str, tokens: int) -> None:
        if self.scarce and KINDS[kind].recall in ("step", "exact"):
            return  # admission sees to it that the host has room for these
        session = Session(kind, self._name())
        keep = plan(KINDS[kind], tokens, MODEL_LAYERS)
        self.generation.open(session.name, keep, self._choose(session))
        new, session.rows = self._new(session, tokens), tokens
        alive = torch.arange(tokens)
        for layer in LAYERS:
            kept = keep.kept[FIRST + layer]
            recent = keep.recent if keep.heads == "each" else 0  # they are relied on
            older = self._any(keep.sets(TOKEN[1]), len(alive) - recent, kept - recent)
            newest = torch.arange(len(alive) - recent, len(alive)).expand(len(older), -1)
            chosen = alive[torch.cat([older, newest], dim=1)]
            if keep.drops_hidden_states:
                gone = alive[~torch.isin(alive, chosen)]
                self._drop(session, layer, gone.tolist())
                alive, keep_rows = chosen[0], None
            else:
                keep_rows = None if chosen.shape[1] == tokens else chosen.numpy()
            rows = alive if keep.drops_hidden_states else torch.arange(tokens)
            self.cache.store_prompt(
                session.name, layer, rows.numpy().astype(np.int32), new[layer][rows], keep_rows
            )
        self.sessions.append(session)

    def _drop(self, session: Session, layer: int, positions: list[int]) -> None:
        if positions:
            hidden = torch.randn(len(positions), 40, generator=self.random).to(self.dtype)
            session.hidden[layer] |= dict(zip(positions, hidden, strict=True))
            self.cache.hidden.spill(
                session.name, layer, np.array(positions, dtype=np.int32), hidden.clone()
            )

    @precondition(lambda self: self._active())
    @rule(data=st.data(), steps=st.integers(1, 30))
    def decode(self, data: st.DataObject, steps: int) -> None:
        """New tokens, one at a time; drafts where the session drafts."""
        session = self._pick(data)
        drafts = self.generation.plan(session.name).drafts
        for _ in range(min(steps, drafts - session.drafts) if drafts else steps):
            if drafts:
                self.generation.settle(session.name, self._generated(session), drafts=True)
            targets = self.generation.targets([session.name])
            step = self.cache.extend([session.name])
            for layer, new in zip(LAYERS, self._new(session, 1), strict=True):
                step.write(layer, new)
            if targets:
                shares = torch.rand(len(LAYERS), 1, TOKEN[1], targets.tail, generator=self.random)
                self.generation.add_scores([session.name], targets, shares)
            self.generation.fed([session.name])
            session.drafts += drafts > 0

    def _mirrored(self, session: Session) -> bool:
        return self.cache.mirrors and self.generation.plan(session.name).drafts > 0

    def _generated(self, session: Session) -> int:
        """Verified tokens behind the prompt."""
        return len(session.kv[0]) - session.drafts - self.generation.plan(session.name).prompt_tokens

    @precondition(lambda self: self._active(drafts=True))
    @rule(data=st.data())
    def verify(self, data: st.DataObject) -> None:
        """All drafts and one more token are fed anew; some of them stay."""
        session = self._pick(data, drafts=True)
        rows = session.drafts + 1
        self.generation.settle(session.name, self._generated(session), drafts=True)
        for layer in LAYERS:
            del session.kv[layer][len(session.kv[layer]) - session.drafts :]
        before = len(session.kv[0])
        fed = [session.name] * rows
        paged, copy = feed(fed, self.cache, self.generation)
        fresh = NewRows(fed, paged, self.cache) if self.cache.mirrors else None
        new = self._new(session, rows)
        for layer in LAYERS:
            batch = (fresh.paged if fresh else paged).write(layer, new[layer])
            assert batch.spilled
            for row in range(rows):
                count = int(batch.lengths[row])
                own = batch.gather(row, row + 1, count)[0]
                back = batch.spilled.gather(row, row + 1, int(batch.spilled.lengths[row]))[0]
                device = self.cache.positions(session.name, layer)[:, :count]
                if fresh:
                    device = np.tile(np.arange(before, before + count), (len(device), 1))
                host = self.cache.host.positions(session.name, layer)
                for both in np.concatenate([device, host], axis=1):
                    assert sorted(both) == list(range(before + row + 1))
                assert same_bits(own, self._truth(session, layer, device).to(own.dtype))
                assert same_bits(back, self._truth(session, layer, host).to(back.dtype))
        copy.wait()
        if fresh:
            fresh.store()
        right = data.draw(st.integers(1, rows))
        for layer in LAYERS:
            del session.kv[layer][before + right :]
        session.drafts = 0
        self.generation.settle(session.name, self._generated(session), drafts=True)

    @precondition(lambda self: self._active())
    @rule(data=st.data(), new=st.integers(1, 30), kept=st.sampled_from([1.0, 1.0, 0.9, 0.3]))
    def next_turn(self, data: st.DataObject, new: int, kept: float) -> None:
        """A turn goes on with all, or the first, of what there is."""
        session = self._pick(data)
        name, old = self._name(), self.generation.plan(session.name)
        self.generation.settle(session.name, self._generated(session), drafts=False)
        whole = len(session.kv[0]) - session.drafts
        reused = max(1, int(kept * whole))
        if old.drops_hidden_states:
            reused = max(reused, old.prompt_tokens)
        reused = max(reused, whole - old.shared(session.rows, whole - old.prompt_tokens))
        for layer in LAYERS:
            del session.kv[layer][reused:]
        session.drafts = 0
        recall = KINDS[session.kind].recall != "off" or reused < old.prompt_tokens
        keep = plan(KINDS[session.kind], reused + new, MODEL_LAYERS)
        self.generation.reopen(session.name, name, keep, reused, self._choose(session))
        session.name, session.rows = name, new
        fresh = self._new(session, new)
        for layer in LAYERS:
            past = self.cache.gather(name, layer, recall)
            assert same_bits(past.kv, self._truth(session, layer, past.positions).to(past.kv.dtype))
            self._take_hidden(session, layer)
            positions = with_rows(past.positions, np.arange(reused, reused + new, dtype=np.int32))
            places = with_rows(past.places, np.full(new, -1))
            tokens = GatheredLayer(positions, places, torch.cat([past.kv, fresh[layer]]))
            count = min(keep.kept[FIRST + layer], tokens.tokens)
            recent = min(keep.recent, new)  # stays in any case
            older = self._any(len(positions), tokens.tokens - recent, count - recent)
            newest = torch.arange(tokens.tokens - recent, tokens.tokens).expand(len(positions), -1)
            chosen = torch.cat([older, newest], dim=1)
            self.cache.replace(name, layer, tokens, chosen.numpy())
            self.generation.keep(name, layer, count)
            expected = np.take_along_axis(positions, chosen.numpy(), axis=1)
            assert self.cache.positions(name, layer).tolist() == expected.tolist()

    def _take_hidden(self, session: Session, layer: int) -> None:
        if session.kind != "prune":
            return
        taken = self.cache.hidden.take(session.name, layer)
        expected, session.hidden[layer] = session.hidden[layer], {}
        if taken is not None:
            assert taken[0].tolist() == list(expected)
            assert same_bits(taken[1], torch.stack(list(expected.values())))
        else:
            assert self.scarce or not expected

    @precondition(lambda self: self._active())
    @rule(data=st.data())
    def recall_some(self, data: st.DataObject) -> None:
        """What a step attends to beyond the device are some that are on the host, each once."""
        session = self._pick(data)
        if session.name not in self.cache.device.keys:
            return
        reach = BestOfHost(self.cache, [0, session.name], ReferenceBackend(self.dtype))
        for layer in LAYERS:
            host = self.cache.host.positions(session.name, layer)
            query = torch.randn(2, 4, TOKEN[2], generator=self.random).to(self.dtype)
            picked = reach(layer, query)
            assert picked.lengths.tolist() == [0, -(-host.shape[1] // RECALLED_OF)]
            kv = picked.gather(1, 2, int(picked.lengths[1]))[0]
            found = {tuple(row.view(-1).tolist()) for row in kv}
            assert len(found) == len(kv)
            assert found <= {tuple(row.view(-1).tolist()) for row in self._truth(session, layer, host)}

    @precondition(lambda self: self._active() and not self.scarce)
    @rule(data=st.data())
    def suspend(self, data: st.DataObject) -> None:
        session = self._pick(data)
        self.generation.settle(session.name, self._generated(session), drafts=False)
        for layer in LAYERS:
            del session.kv[layer][len(session.kv[layer]) - session.drafts :]
        session.drafts = 0
        self.cache.suspend(session.name)
        session.suspended = True

    @precondition(lambda self: any(each.suspended for each in self.sessions))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from([each for each in self.sessions if each.suspended]))
        self.cache.resume(session.name)
        session.suspended = False

    @rule(count=st.integers(1, 8))
    def complete_some_copies(self, count: int) -> None:
        self.link.complete(count)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        self.sessions.remove(session)
        self.generation.close(session.name)
        self.cache.release(session.name)

    @invariant()
    def what_is_held_is_right(self) -> None:
        self.cache.check_integrity()
        for session in self.sessions:
            for layer in LAYERS:
                tokens = len(session.kv[layer])
                device = self.cache.positions(session.name, layer)
                host = self.cache.host.positions(session.name, layer)
                if self._mirrored(session):
                    assert tokens - session.drafts <= host.shape[1] <= tokens
                    assert (host == np.arange(host.shape[1])).all()
                    assert (device[:, device.shape[1] - session.drafts :] >= tokens - session.drafts).all()
                else:
                    for held in map(sorted, np.concatenate([device, host], axis=1).tolist()):
                        assert len(set(held)) == len(held)
                        if not self.scarce and session.kind != "prune":
                            assert held == list(range(tokens))
                if not session.suspended:
                    own = self.cache.device.read(session.name, layer)
                    assert same_bits(own, self._truth(session, layer, device))
                back = self.cache.host.read(session.name, layer)
                if back is not None:
                    assert same_bits(back, self._truth(session, layer, host).to(back.dtype))

    def teardown(self) -> None:
        for session in self.sessions:
            self.cache.release(session.name)
        self.link.complete(self.link.pending)
        self.cache.check_integrity()
        assert self.cache.device.pool.allocator.pages_in_use == self.cache.host.bytes_in_use == 0


@pytest.mark.hypothesis
def test_whatever_happens_to_sessions_their_tokens_are_theirs() -> None:
    chosen = settings(max_examples=examples(20), stateful_step_count=30)
    run_state_machine_as_test(Recalling, settings=chosen)


def test_a_cache_that_forgets_to_empty_the_places_of_recalled_tokens_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchange = HostStore.exchange

    def forgetful(store: HostStore, sequence: int, layer: int, freed: np.ndarray, *new: object) -> None:
        exchange(store, sequence, layer, freed[:0], *new)  # type: ignore[arg-type]

    monkeypatch.setattr(HostStore, "exchange", forgetful)
    chosen = settings(
        max_examples=60,
        stateful_step_count=30,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        derandomize=True,
    )
    with pytest.raises((AssertionError, IntegrityError)):
        run_state_machine_as_test(Recalling, settings=chosen)
