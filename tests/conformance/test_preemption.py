"""Sequences that make room for others say what they would have said alone, and leave nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyramidserve.types import (
    Compression,
    Receipt,
    Sampling,
    Stopping,
)
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens

OUTPUT, POOL_BYTES = 150, 400 << 10
PARAMETERS = {"min_context_length": 8, "exceed_length_to_compress": 8, "gen_compress_ratio": 0.9}
POLICIES = {
    "full": Compression(),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 120}),
    "prune": Compression("pyramid", "prune", parameters=PARAMETERS),
    "evict": Compression("pyramid", "evict", parameters=PARAMETERS),
    "h2o": Compression("h2o", parameters={"tokens": 120, "drop": 7}),
}
PROMPTS = [list(range(3 + shift, 23 + shift)) for shift in range(6)]


def build(checkpoint: Path, shards: int, host_bytes: int, dtype: str) -> Engine:
    """An engine whose pool holds the prompts of all, but not what becomes of them."""
    return Engine(
        EngineConfig(
            checkpoint=str(checkpoint),
            dtype=dtype,
            boundaries={1: (), 2: (2,), 3: (1, 4)}[shards],
            kv_bytes=POOL_BYTES if dtype == "float32" else POOL_BYTES // 2,
            host_bytes=host_bytes,
            max_sequences=16,
            max_prefill_tokens=64,
        )
    )


def requests(compression: Compression) -> list[EngineRequest]:
    return [
        EngineRequest(
            prompt,
            Sampling(temperature=0.9 * (number % 2), seed=number),
            Stopping(max_tokens=OUTPUT, ignore_eos=True),
            compression,
        )
        for number, prompt in enumerate(PROMPTS)
    ]


def run_all_at_once(engine: Engine, wanted: list[EngineRequest]) -> dict[int, tuple[list[int], Receipt]]:
    """Admits all, whatever the forecast says; returns each one's tokens as they were told, and receipt."""
    told: dict[int, list[int]] = {}
    receipts = {}
    for request in wanted:
        number, _ = engine.submit(request)
        told[number] = []
        assert engine.loop.admit(engine._waiting.popleft())
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, SequenceTokens):
                assert event.tokens.index == len(told[event.sequence])
                told[event.sequence] += event.tokens.token_ids
            elif isinstance(event, SequenceFinished):
                receipts[event.sequence] = event.receipt
        engine.check_integrity()
    return {number: (told[number], receipts[number]) for number in told}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("host_bytes", [8 << 20, 0], ids=["to the host", "computed again"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_made_room_goes_on_as_if_it_had_not(
    name: str, host_bytes: int, shards: int, toy: Callable[[str], Path]
) -> None:
    engine = build(toy("gqa"), shards, host_bytes, "float32")
    wanted = requests(POLICIES[name])
    alone = [engine.generate([request])[0] for request in wanted]
    together = list(run_all_at_once(engine, wanted).values())
    assert [tokens for tokens, _ in together] == [list(reply.token_ids) for reply in alone]
    preempted = [receipt.preemptions for _, receipt in together]
    assert preempted[0] == 0
    assert sum(preempted) > 0
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


def test_in_bfloat16_what_comes_back_is_bit_for_bit_what_went(
    toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(toy("gqa"), 1, 8 << 20, "bfloat16")
    cache = engine.stages[0].cache
    went: dict[int, list[torch.Tensor]] = {}
    suspend, resume = cache.suspend, cache.resume

    def held(sequence: int) -> list[torch.Tensor]:
        layers = [cache.device.read(sequence, layer) for layer in range(engine.model.layers)]
        return [*layers, cache.device.scores.read(sequence)]

    def watched_suspend(sequence: int) -> None:
        went[sequence] = held(sequence)
        suspend(sequence)

    def watched_resume(sequence: int) -> None:
        resume(sequence)
        assert all(map(torch.equal, went.pop(sequence), held(sequence)))

    monkeypatch.setattr(cache, "suspend", watched_suspend)
    monkeypatch.setattr(cache, "resume", watched_resume)
    receipts = [receipt for _, receipt in run_all_at_once(engine, requests(POLICIES["evict"])).values()]
    assert sum(receipt.preemptions for receipt in receipts) > 0
    assert not went
