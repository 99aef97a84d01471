"""With recall "exact" the compressed cache drafts, and the reply is the full cache's, token by token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drafted import drafted, ids

from pyramidserve.errors import InvalidRequestError, RequestTooLargeError
from pyramidserve.types import (
    Compression,
)
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.engine.stage import Stage
from workers.policies.registry import DRAFTS
from workers.schedule.step import Step, StepKind

OUTPUT = 120
PARAMETERS = {"min_context_length": 8, "gen_compress_ratio": 0.9}
POLICIES = {
    "evict": Compression("pyramid", "evict", parameters=PARAMETERS),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 20}),
}
FULL = Compression()


def requests(compression: Compression, output: int = OUTPUT) -> list[EngineRequest]:
    return drafted(compression, output, 6)


def exactly(compression: Compression) -> Compression:
    return replace(compression, recall="exact")


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_greedy_and_sampled_replies_are_the_full_caches(
    name: str, shards: int, toy_engine: Callable[..., Engine]
) -> None:
    engine = toy_engine(shards=shards)
    mixed = [
        request for kind in (exactly(POLICIES[name]), FULL, POLICIES[name]) for request in requests(kind)
    ]
    replies = engine.generate(mixed)
    assert ids(replies[:6]) == ids(replies[6:12]) != ids(replies[12:])
    engine.check_integrity()
    receipts = [reply.receipt for reply in replies[:6]]
    drafted = sum(receipt.drafted_tokens for receipt in receipts)
    assert 0 < sum(receipt.accepted_tokens for receipt in receipts) < drafted
    for receipt in receipts:
        assert receipt.recall == "exact"
        assert receipt.host_attended_bytes > receipt.spilled_bytes > receipt.dropped_bytes == 0
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


def test_wrong_drafts_never_reach_what_is_compressed(
    toy_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, device and host together hold each verified token once, and nothing else."""
    engine = toy_engine(shards=2)
    run = Stage.run
    across = 0

    def watched(stage: Stage, step: Step, inputs: torch.Tensor) -> tuple[Step, torch.Tensor]:
        nonlocal across
        done = run(stage, step, inputs)
        cache = stage.cache
        for key in step.sequences if step.kind is not StepKind.RELEASE else ():
            growing = stage._generation._sequences[key]
            plan, generated, unverified = growing.plan, growing.generated, growing.unverified
            verified, generation = plan.prompt_tokens + generated, plan.generation
            assert generation is not None
            across += generation.chunks(generated + unverified) > generation.chunks(generated)
            for layer in range(cache.layers):
                (held,) = np.concatenate(
                    (cache.positions(key, layer), cache.host.positions(key, layer)), axis=1
                )
                assert sorted(held) == list(range(verified + unverified))
                on_device = plan.tokens(stage.layout.first + layer, generated)
                assert cache.host.count(key, layer) == verified - on_device
        return done

    monkeypatch.setattr(Stage, "run", watched)
    engine.generate(requests(exactly(POLICIES["evict"])))
    assert across > 0


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("host_bytes", [4 << 20, 1100 << 10], ids=["to the host", "computed again"])
def test_what_made_room_goes_on_as_the_full_cache_would(
    host_bytes: int, shards: int, toy: Callable[[str], Path]
) -> None:
    def build(kv_bytes: int, host_bytes: int) -> Engine:
        return Engine(
            EngineConfig(
                checkpoint=str(toy("gqa")),
                dtype="float32",
                boundaries=(2,) if shards == 2 else (),
                kv_bytes=kv_bytes,
                host_bytes=host_bytes,
                max_sequences=8,
            )
        )

    expected = build(8 << 20, 0).generate(requests(FULL, 150))
    engine = build(512 << 10, host_bytes)
    wanted = requests(exactly(POLICIES["evict"]), 150)
    for request in wanted:
        engine.submit(request)
    while engine._waiting and engine.loop.admit(engine._waiting[0]):
        engine._waiting.popleft()
    told: dict[int, list[int]] = {}
    receipts = []
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, SequenceTokens):
                assert event.tokens.index == len(told.setdefault(event.sequence, []))
                told[event.sequence] += event.tokens.token_ids
            elif isinstance(event, SequenceFinished):
                receipts.append(event.receipt)
        engine.check_integrity()
    assert [tuple(told[number]) for number in sorted(told)] == ids(expected)
    assert sum(receipt.preemptions for receipt in receipts) > 0
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


def test_output_that_a_client_has_is_verified_many_at_a_time(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine()
    (request,) = requests(exactly(POLICIES["evict"]))[:1]
    whole = engine.generate([request])[0].token_ids
    steps = engine.loop.scheduler._steps._made
    (rest,) = engine.generate([replace(request, resume_output_ids=whole[:-1])])
    assert rest.token_ids == whole[-1:]
    assert engine.loop.scheduler._steps._made - steps < 3 + OUTPUT / DRAFTS


def test_exactness_needs_all_kv_and_room_for_it(toy: Callable[[str], Path]) -> None:
    engine = Engine(EngineConfig(checkpoint=str(toy("gqa")), kv_bytes=4 << 20, host_bytes=64 << 10))
    for recall in ("step", "exact"):
        with pytest.raises(InvalidRequestError, match="needs all KV, which prefill 'prune' never computes"):
            engine.submit(EngineRequest("a", compression=Compression("pyramid", recall=recall)))
    with pytest.raises(InvalidRequestError, match="recall is 'always'; it must be one of off, turn"):
        engine.submit(EngineRequest("a", compression=Compression(recall="always")))
    with pytest.raises(
        RequestTooLargeError, match=r"of the host's \[.*host_bytes, or ask for recall 'off'"
    ):
        engine.submit(requests(exactly(POLICIES["streaming"]))[0])
    assert engine.idle
