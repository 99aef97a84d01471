"""Prefills come to the same in blocks of any size, alone or packed, whatever runs in between."""

from collections.abc import Callable, Sequence

import pytest

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineRequest, TracedReply
from workers.engine.loop import SequenceTokens

PROMPTS = [[3 + (7 * i * i + length) % 250 for i in range(length)] for length in (1, 30, 70, 150)]
COMPRESSIONS = [
    Compression(),
    Compression("pyramid", "prune", kv_keep=0.6),
    Compression("pyramid", "evict", kv_keep=0.6),
    Compression("streaming", parameters={"sinks": 2, "window": 40}),
    *(
        Compression(policy, kv_keep=0.4)
        for policy in (
            "h2o",
            "scissorhands",
            "snapkv",
            "keydiff",
            "expected_attention",
            "defensive",
            "kvzap",
        )
    ),
]


def traced(engine: Engine, compressions: Sequence[Compression]) -> list[TracedReply]:
    return engine.trace(
        [
            EngineRequest(
                prompt, stopping=Stopping(4, ignore_eos=True), compression=compression, trace=True
            )
            for prompt in PROMPTS
            for compression in compressions
        ]
    )


def check_same(one: TracedReply, other: TracedReply) -> None:
    assert one.traced is not None
    assert other.traced is not None
    for ours, theirs in zip(one.traced.shards, other.traced.shards, strict=True):
        for some, same in zip(ours.positions, theirs.positions, strict=True):
            assert some.tolist() == same.tolist()
    assert one.traced.top.logits == pytest.approx(other.traced.top.logits, rel=1e-4, abs=1e-4)
    assert one.reply.token_ids == other.reply.token_ids


@pytest.mark.parametrize("rows", [1, 7, 32, 100])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_size_of_blocks_changes_nothing(
    rows: int, shards: int, toy_engine: Callable[..., Engine]
) -> None:
    whole = traced(toy_engine("gqa", shards), COMPRESSIONS)
    engine = toy_engine("gqa", shards, block_rows=rows)
    for one, other in zip(whole, traced(engine, COMPRESSIONS), strict=True):
        check_same(one, other)
    engine.check_integrity()


def test_decodes_between_the_blocks_change_nothing(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine("gqa")
    requests = [
        EngineRequest(PROMPTS[3], stopping=Stopping(4, ignore_eos=True), compression=compression)
        for compression in COMPRESSIONS
    ]
    running = EngineRequest([5, 6, 7], stopping=Stopping(250, ignore_eos=True))
    alone = [reply.token_ids for reply in (*engine.generate(requests), *engine.generate([running]))]
    engine = toy_engine("gqa", block_rows=8)
    first, _ = engine.submit(running)
    said: dict[int, list[int]] = {first: []}
    for request in requests:
        # The stream has begun: from now on its decodes come between the blocks of the prefills.
        collect(engine, said, until=lambda: len(said[first]) > 20 * len(said))
        said[engine.submit(request)[0]] = []
    before = len(said[first])
    collect(engine, said, until=lambda: engine.idle)
    assert before < len(said[first])
    assert [tuple(said[number]) for number in (*list(said)[1:], first)] == alone
    engine.check_integrity()


def collect(engine: Engine, said: dict[int, list[int]], until: Callable[[], bool]) -> None:
    """Steps ``engine`` and notes what each sequence says."""
    while not until():
        for event in engine.step():
            if isinstance(event, SequenceTokens):
                said[event.sequence] += event.tokens.token_ids
