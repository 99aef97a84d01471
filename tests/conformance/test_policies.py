"""Policies, prefill, shards and dtypes, crossed: memory follows the plan, and all of it comes back."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyramidserve.types import (
    Compression,
    Receipt,
    Sampling,
    Stopping,
)
from workers.budget.footprint import pages_held
from workers.budget.pages import IntegrityError
from workers.engine.engine import Engine, EngineConfig, EngineRequest

PARAMETERS = {"min_context_length": 8, "exceed_length_to_compress": 8}
POLICIES = {
    "full": Compression(),
    "local": Compression("local", parameters={"window": 30}),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 30}),
    "streaming-keep": Compression("streaming", kv_keep=0.4),
    "prune": Compression("pyramid", "prune", parameters=PARAMETERS),
    "prune-keep": Compression("pyramid", "prune", kv_keep=0.6),
    "evict": Compression("pyramid", "evict", parameters=PARAMETERS),
    "evict-keep": Compression("pyramid", "evict", kv_keep=0.6),
}
PROMPTS = [[7], list(range(3, 50)), list(range(3, 153)), [9, 8, 7] * 33]


@pytest.fixture(params=[1, 2, 3], ids=lambda shards: f"{shards}-shards")
def shards(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture(params=["float32", "bfloat16"])
def engine(
    request: pytest.FixtureRequest, shards: int, toy_engine: Callable[..., Engine]
) -> Iterator[Engine]:
    built = toy_engine("gqa", shards, request.param)
    yield built
    for stage in built.stages:
        stage.cache.check_integrity()
        assert stage.cache.device.pool.allocator.pages_in_use == 0
        assert stage.cache.host.bytes_in_use == 0
        assert len(stage.cache) == 0
    assert len(built.loop.scheduler.memory) == 0


def _requests(compression: Compression, max_tokens: int = 40) -> list[EngineRequest]:
    stopping = Stopping(max_tokens=max_tokens, ignore_eos=True)
    return [
        EngineRequest(prompt, Sampling(temperature=t, seed=5), stopping, compression)
        for prompt, t in zip(PROMPTS, (0.0, 0.8, 0.0, 1.3), strict=True)
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_pages_in_use_are_the_sum_that_the_policy_says(name: str, engine: Engine) -> None:
    for request in _requests(POLICIES[name]):
        engine.submit(request)
    steps = exact = 0
    while not engine.idle:
        engine.step()
        engine.check_integrity()
        for stage in engine.stages:
            least = most = 0
            for sequence in engine.loop.scheduler.sequences.values():
                fed = len(sequence.output_ids) - 1
                # A step that has come back from the last shard may be followed by others in the first.
                ahead = len(engine.stages) > 1
                held = {pages_held(sequence.plan, stage.layout, max(0, fed + more)) for more in (0, ahead)}
                present = sequence.request.sequence in stage.cache
                # A release, too, has passed the first shard before it is told of.
                least += min(held) if fed >= 0 and (present or not sequence.ended) else 0
                most += max(held) if present else 0
            assert least <= stage.cache.device.pool.allocator.pages_in_use <= most
            exact += least == most
        assert (engine.loop.scheduler.memory.ledger.free >= 0).all()
        steps += 1
    assert steps > 40
    assert exact > 30


@pytest.mark.parametrize("name", POLICIES)
def test_a_mixed_batch_answers_as_each_alone(name: str, engine: Engine) -> None:
    if engine.stages[0].cache.device.pool.rows.element_size() == 2:
        pytest.skip("equality across batch shapes is a claim for fp32 alone")
    requests = _requests(POLICIES[name])
    together = [reply.token_ids for reply in engine.generate(requests)]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    assert together == alone
    assert all(len(tokens) == 40 for tokens in together)


@pytest.mark.parametrize("name", POLICIES)
def test_receipts_account_for_every_token_of_every_layer(name: str, engine: Engine) -> None:
    for request, reply in zip(
        _requests(POLICIES[name]), engine.generate(_requests(POLICIES[name])), strict=True
    ):
        _check_receipt(len(list(request.prompt)), reply.receipt, engine)


def _check_receipt(prompt_tokens: int, receipt: Receipt, engine: Engine) -> None:
    fed = prompt_tokens + receipt.output_tokens - 1
    assert [layer.layer for layer in receipt.layers] == list(range(engine.model.layers))
    for layer in receipt.layers:
        assert layer.prompt_kept + layer.generated_kept + layer.spilled + layer.dropped == fed
    if receipt.policy != "pyramid/prune":
        assert not any(layer.dropped for layer in receipt.layers)
    spilled = sum(layer.spilled for layer in receipt.layers)
    row = engine.stages[0].layout.page_bytes // 16
    assert receipt.spilled_bytes == spilled * row
    assert receipt.dropped_bytes == 0


@pytest.mark.parametrize("name", POLICIES)
def test_the_split_does_not_change_what_is_kept_or_said(
    name: str, toy_engine: Callable[..., Engine]
) -> None:
    traces = []
    for count in (1, 2, 3):
        requests = [
            EngineRequest(r.prompt, r.sampling, r.stopping, r.compression, trace=True)
            for r in _requests(POLICIES[name])
        ]
        traced = toy_engine("gqa", count).trace(requests)
        traces.append(
            [
                (
                    t.reply.token_ids,
                    [p.tolist() for shard in t.traced.shards for p in shard.positions],
                )
                for t in traced
                if t.traced
            ]
        )
    assert len(traces[0]) == len(PROMPTS)
    assert traces[0] == traces[1] == traces[2]


def test_forced_output_continues_as_if_never_interrupted(engine: Engine) -> None:
    if engine.stages[0].cache.device.pool.rows.element_size() == 2:
        pytest.skip("equality across batch shapes is a claim for fp32 alone")
    for compression in POLICIES.values():
        for request in _requests(compression):
            whole = engine.generate([request])[0].token_ids
            resumed = EngineRequest(
                request.prompt,
                request.sampling,
                request.stopping,
                compression,
                resume_output_ids=whole[:17],
            )
            (reply,) = engine.generate([resumed])
            assert reply.token_ids == whole[17:]
            assert reply.receipt.output_tokens == 40


CHUNKS = {
    "full": Compression(),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 24}),
    **{
        prefill: Compression(
            "pyramid",
            prefill,
            parameters={"min_context_length": 8, "exceed_length_to_compress": 8, "gen_compress_ratio": 0.9},
        )
        for prefill in ("prune", "evict")
    },
}


@pytest.mark.parametrize("shards", [1, 3])
def test_known_output_is_fed_in_chunks_that_end_where_compression_runs(
    toy_engine: Callable[..., Engine], shards: int
) -> None:
    engine = toy_engine("gqa", shards)
    for name, compression in CHUNKS.items():
        stopping = Stopping(max_tokens=150, ignore_eos=True)
        requests = [
            EngineRequest(list(range(3 + shift, 43 + shift)), stopping=stopping, compression=compression)
            for shift in range(3)
        ]
        whole = [reply.token_ids for reply in engine.generate(requests)]
        resumed = [
            replace(request, resume_output_ids=ids[:known])
            for request, ids, known in zip(requests, whole, (1, 100, 149), strict=True)
        ]
        replies = engine.generate(resumed)
        assert [reply.token_ids for reply in replies] == [
            ids[known:] for ids, known in zip(whole, (1, 100, 149), strict=True)
        ], name
        before = engine.loop.scheduler._steps._made
        engine.generate(resumed[-1:])
        # A prefill, a release, and a step for each chunk, instead of 149.
        chunks = 150 / (8 if compression.policy == "pyramid" else 16)
        assert engine.loop.scheduler._steps._made - before <= chunks + 6, name


def test_closing_a_stream_at_any_token_frees_everything(engine: Engine) -> None:
    for compression in POLICIES.values():
        request = _requests(compression)[2]
        for stop_after in (0, 1, 2, 13):
            stream = engine.stream(request)
            for _ in range(stop_after):
                next(stream)
            stream.close()
            assert engine.idle


@pytest.mark.parametrize("shard", [0, 1])
def test_a_page_that_is_lost_is_missed_once_nothing_runs(shard: int, toy: Callable[[str], Path]) -> None:
    engine = Engine(EngineConfig(str(toy("gqa")), boundaries=(1,), dtype="float32", kv_bytes=8 << 20))
    request = EngineRequest(PROMPTS[1], stopping=Stopping(4, ignore_eos=True))
    engine.generate([request] * 2)
    engine.stages[shard].cache.device.pool.allocator.allocate(1, "nobody")
    with pytest.raises(IntegrityError, match="1 pages are in use, sequences own 0"):
        engine.generate([request] * 2)
