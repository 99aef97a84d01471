"""Every policy of the registry, prefill, heads, recall, shards, dtypes and types of KV: each pair once."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import combinations, product
from typing import get_args

import numpy as np
import pytest

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Recall, Stopping
from workers.engine.engine import Engine, EngineRequest, TracedReply
from workers.policies.policy import describe
from workers.policies.registry import BUILT_IN
from workers.policies.valid import validate

CONTEXT, OUTPUT = 140, 40
# Those that may let go of the newest tokens, which are finer than others on the device alone.
DROP_NEW = ("tova", "h2o", "scissorhands")
PROMPTS = ([5], list(range(3, 33)), list(range(3, CONTEXT + 3)))


@dataclass(frozen=True)
class Cell:
    """One combination."""

    policy: str
    prefill: str
    heads: str
    recall: str
    shards: int
    dtype: str
    kv_dtype: str

    @property
    def compression(self) -> Compression:
        parameters = {"heads": self.heads} if self.heads else {}
        kv_keep = None if self.policy == "full" else 0.4
        return Compression(self.policy, self.prefill, kv_keep, self.recall, parameters)

    def pairs(self) -> set[tuple[object, ...]]:
        named = [(each.name, getattr(self, each.name)) for each in fields(self)]
        return set(combinations(named, 2))


def possible() -> list[Cell]:
    """All combinations that are not refused."""
    cells = []
    for policy in BUILT_IN:
        heads = ["each", "all"] if any(name == "heads" for name, *_ in describe(policy)) else [""]
        for rest in product(
            *(policy.prefills or ("",), heads, get_args(Recall), (1, 3), ("float32", "bfloat16")),
            ("auto", "int8", "int4"),
        ):
            cell = Cell(policy.name, *rest)
            try:
                validate(cell.compression)
            except InvalidRequestError:
                continue
            cells.append(cell)
    return cells


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Few of them that have every pair of values that any has."""
    missing, chosen = set().union(*(cell.pairs() for cell in cells)), []
    while missing:
        best = max(cells, key=lambda cell: len(cell.pairs() & missing))
        missing -= best.pairs()
        chosen.append(best)
    return chosen


CELLS = pairwise(possible())


def test_every_policy_is_there_in_each_way() -> None:
    assert {cell.policy for cell in CELLS} == {policy.name for policy in BUILT_IN}
    assert {(cell.policy, cell.recall) for cell in CELLS} == {(c.policy, c.recall) for c in possible()}
    assert len(CELLS) < 90


def ask(engine: Engine, prompt: list[int], cell: Cell, session: str = "") -> TracedReply:
    request = EngineRequest(
        prompt,
        stopping=Stopping(OUTPUT, ignore_eos=True),
        compression=cell.compression,
        session_id=session,
        trace=True,
    )
    (traced,) = engine.trace([request])
    return traced


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, vars(cell).values())))
def test_what_a_cell_keeps_spills_and_says_is_right(cell: Cell, toy_engine: Callable[..., Engine]) -> None:
    # Heads of whole vectors of pairs, which compiled kernels want.
    kind = "wide-heads" if cell.kv_dtype == "int4" else "gqa"
    engine = toy_engine(kind, cell.shards, cell.dtype, kv_dtype=cell.kv_dtype)
    same = toy_engine(kind, 4 - cell.shards, cell.dtype, kv_dtype=cell.kv_dtype)
    for prompt in PROMPTS:
        traced, other = ask(engine, prompt, cell), ask(same, prompt, cell)
        fed = len(prompt) + OUTPUT - 1
        for layer, held in zip(traced.reply.receipt.layers, traced.positions, strict=True):
            assert layer.prompt_kept + layer.generated_kept + layer.spilled + layer.dropped == fed
            assert held.shape[1] == layer.prompt_kept + layer.generated_kept
            assert (np.diff(held) > 0).all()
            assert held.max(initial=0) < fed
        # The split changes nothing but what 16 bits round between shards, which may decide near ties.
        assert traced.reply.token_ids[0] == other.reply.token_ids[0]
        assert [own.shape for own in traced.positions] == [own.shape for own in other.positions]
        if cell.dtype == "float32":
            assert traced.reply.token_ids == other.reply.token_ids
            assert [own.tolist() for own in traced.positions] == [own.tolist() for own in other.positions]
        if cell.heads == "each":
            assert {len(own) for own in traced.positions} == {engine.model.kv_heads}
    if cell.dtype == "float32":
        goes_on_as_it_should(engine, cell)
    engine.check_integrity()
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == 0


def goes_on_as_it_should(engine: Engine, cell: Cell) -> None:
    """Output that is known leads to the same, and a conversation that recalls is whole."""
    prompt = PROMPTS[-1]
    said = ask(engine, prompt, cell).reply.token_ids
    resumed = EngineRequest(
        prompt,
        stopping=Stopping(OUTPUT, ignore_eos=True),
        compression=cell.compression,
        resume_output_ids=said[:23],
    )
    (rest,) = engine.generate([resumed])
    assert rest.token_ids == said[23:]
    if cell.recall == "exact" and (cell.kv_dtype != "int4" or cell.policy not in DROP_NEW):
        whole = EngineRequest(prompt, stopping=Stopping(OUTPUT, ignore_eos=True))
        assert engine.generate([whole])[0].token_ids == said
    first = ask(engine, PROMPTS[1], cell, "s").reply
    history = [*PROMPTS[1], *first.token_ids, 9, 8, 7]
    second = ask(engine, history, cell, "s")
    assert second.reply.receipt.reused_tokens == len(history) - 4
    engine.end_session("s")
    # Where KV is rounded, a prompt that is computed anew is not what was stored of it.
    if cell.recall == "exact" and cell.kv_dtype == "auto":
        whole = EngineRequest(history, stopping=Stopping(OUTPUT, ignore_eos=True))
        assert engine.generate([whole])[0].token_ids == second.reply.token_ids
