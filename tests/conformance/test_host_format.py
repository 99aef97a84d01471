"""Where the host has KV in another format than the device, what it has is as exact as that."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drafted import drafted, ids

from pyramidserve.errors import ConfigurationError
from pyramidserve.types import Compression, Receipt, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens

Said = list[tuple[int, ...]]
OUTPUT = 70
FULL = Compression()
POLICIES = {
    "pyramid": Compression(
        "pyramid", "evict", parameters={"min_context_length": 8, "gen_compress_ratio": 0.9}, recall="exact"
    ),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 20}, recall="exact"),
    "h2o": Compression("h2o", kv_keep=0.3, recall="exact"),
    "tova": Compression("tova", kv_keep=0.3, parameters={"heads": "each"}, recall="exact"),
    "defensive": Compression("defensive", kv_keep=0.3, recall="exact"),
}


def engine(
    checkpoint: Path,
    kv_dtype: str,
    host_kv_dtype: str = "float32",
    shards: int = 1,
    kv_bytes: int = 8 << 20,
    host_bytes: int = 8 << 20,
) -> Engine:
    return Engine(
        EngineConfig(
            checkpoint=str(checkpoint),
            dtype="float32",
            kv_dtype=kv_dtype,
            host_kv_dtype=host_kv_dtype,
            boundaries={1: (), 2: (2,), 3: (1, 4)}[shards],
            kv_bytes=kv_bytes,
            host_bytes=host_bytes,
            max_sequences=12,
        )
    )


def requests(compression: Compression, output: int = OUTPUT) -> list[EngineRequest]:
    return drafted(compression, output, 5)


def nothing_is_left(engine: Engine) -> None:
    engine.check_integrity()
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


@pytest.fixture(scope="module")
def whole(toy: Callable[[str], Path]) -> dict[str, Said]:
    """What the full cache says in fp32, by kind of toy."""
    return {
        kind: ids(engine(toy(kind), "float32").generate(requests(FULL))) for kind in ("gqa", "wide-heads")
    }


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", POLICIES)
def test_exact_is_the_full_cache_whatever_the_device_holds(
    name: str,
    kv_dtype: str,
    shards: int,
    toy: Callable[[str], Path],
    whole: dict[str, Said],
) -> None:
    kind = "wide-heads" if kv_dtype == "int4" else "gqa"
    drafting = engine(toy(kind), kv_dtype, shards=shards)
    replies = drafting.generate(requests(POLICIES[name]))
    assert ids(replies) == whole[kind]
    receipts = [reply.receipt for reply in replies]
    accepted = sum(receipt.accepted_tokens for receipt in receipts)
    assert 0 < accepted < sum(receipt.drafted_tokens for receipt in receipts)
    for request, receipt in zip(requests(POLICIES[name]), receipts, strict=True):
        fed = len(request.prompt) + (request.stopping.max_tokens or 0) - 1
        for layer in receipt.layers:
            assert layer.dropped == 0
            assert layer.prompt_kept + layer.generated_kept + layer.spilled == fed
    nothing_is_left(drafting)


def test_layers_with_windows_narrower_than_what_is_verified_at_once(
    toy: Callable[[str], Path], tmp_path: Path
) -> None:
    narrow = tmp_path / "narrow"
    shutil.copytree(toy("mistral-window"), narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"sliding_window": 5}))
    said = ids(engine(narrow, "float32").generate(requests(FULL)))
    drafting = engine(narrow, "int8", shards=2)
    assert ids(drafting.generate(requests(POLICIES["pyramid"]))) == said
    # All that a client has at once, so that as many are verified together as ever are.
    (request,) = requests(POLICIES["pyramid"])[:1]
    (rest,) = drafting.generate([replace(request, resume_output_ids=said[0][:-1])])
    assert rest.token_ids == said[0][-1:]
    nothing_is_left(drafting)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_turns_of_a_session_are_the_full_caches(kv_dtype: str, toy: Callable[[str], Path]) -> None:
    kind = "wide-heads"
    full, drafting = engine(toy(kind), "float32"), engine(toy(kind), kv_dtype, shards=2)
    (request,) = requests(POLICIES["defensive"], 30)[:1]
    history = [each for each in request.prompt if isinstance(each, int)]
    for turn in range(3):
        said = full.generate([replace(request, prompt=history, compression=FULL)])[0].token_ids
        (reply,) = drafting.generate([replace(request, prompt=history, session_id="s")])
        assert reply.token_ids == said
        assert (reply.receipt.reused_tokens > 0) == (turn > 0)
        drafting.check_integrity()
        history = [*history, *said[: -3 if turn else None], 9, 8, 7]
    drafting.end_session("s")
    nothing_is_left(drafting)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize("host_bytes", [8 << 20, 2500 << 10], ids=["to the host", "computed again"])
def test_what_made_room_goes_on_as_the_full_cache_would(
    kv_dtype: str, host_bytes: int, toy: Callable[[str], Path]
) -> None:
    said = ids(engine(toy("wide-heads"), "float32").generate(requests(FULL, 110)))
    tight = engine(toy("wide-heads"), kv_dtype, kv_bytes=190 << 10, host_bytes=host_bytes)
    told: dict[int, list[int]] = {}
    receipts: list[Receipt] = []
    for request in requests(POLICIES["pyramid"], 110):
        tight.submit(request)
    while not tight.idle:
        for event in tight.step():
            if isinstance(event, SequenceTokens):
                told.setdefault(event.sequence, []).extend(event.tokens.token_ids)
            elif isinstance(event, SequenceFinished):
                receipts.append(event.receipt)
        tight.check_integrity()
    assert [tuple(told[number]) for number in sorted(told)] == said
    assert sum(receipt.preemptions for receipt in receipts) > 0
    nothing_is_left(tight)


def test_what_comes_back_is_as_the_host_has_it(toy: Callable[[str], Path]) -> None:
    """Of a prompt's tokens none is rounded to what the device has that has never been there."""
    (request,) = requests(replace(POLICIES["streaming"], recall="turn"))[:1]
    finer, coarser = engine(toy("gqa"), "int8"), engine(toy("gqa"), "int8", "auto")
    plain = engine(toy("gqa"), "float32")
    gathered = []
    for each in (plain, finer, coarser):
        each.generate([replace(request, session_id="s", stopping=Stopping(1))])
        (stage,) = each.stages
        (key,) = stage.cache._sequences
        held = [stage.cache.gather(key, layer, recall=True) for layer in range(stage.cache.layers)]
        assert all((layer.positions == held[0].positions).all() for layer in held)
        gathered.append([layer.kv.numpy() for layer in held])
        spilled = stage.cache.host.positions(key, 0)[0]
        each.end_session("s")
        nothing_is_left(each)
    there = np.isin(held[0].positions[0], spilled)
    for exact, fine, coarse in zip(*gathered, strict=True):
        assert (fine[there] == exact[there]).all()
        assert not (fine[~there] == exact[~there]).all()
        assert not (coarse[there] == exact[there]).all()


def test_a_host_that_has_less_than_the_device_is_refused(toy: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"host_kv_dtype is 'int8', but kv_dtype has 32 bits"):
        engine(toy("gqa"), "auto", "int8")
    with pytest.raises(ConfigurationError, match=r"host_kv_dtype is 'int2'; it must be one of auto"):
        engine(toy("gqa"), "auto", "int2")
