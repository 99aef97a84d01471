"""All ways to serve a sequence run on a device of its own memory, and say what the CPU says."""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

import pytest
import torch
from pretended_device import DEVICE, MixedDevicesError, counts, pretending
from test_policies import POLICIES
from test_preemption import POLICIES as WITHOUT_RECALL
from test_preemption import run_all_at_once
from test_turns_of_sessions import POLICIES as SESSIONS
from toy import LIFT_AT_ONCE, write_toy

from pyramidserve.types import Compression, Recall, Sampling, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.interleave import OnAdvance, unobserved
from workers.engine.pipeline import connect_local
from workers.kv.link import MemoryLink
from workers.schedule.step import StepKind

CPU = torch.device("cpu")
LAYERS, BOUNDARIES = 3, {1: (), 2: (2,), 3: (1, 2)}
KINDS = {
    **POLICIES,
    **{f"evict {recall}": replace(POLICIES["evict"], recall=recall) for recall in get_args(Recall)},
    "streaming exact": replace(POLICIES["streaming"], recall="exact"),
    "h2o step": Compression("h2o", kv_keep=0.4, recall="step", parameters={"drop": 3}),
    "scissorhands turn": Compression("scissorhands", kv_keep=0.4, recall="turn"),
    "keydiff exact": Compression("keydiff", kv_keep=0.4, recall="exact"),
    "expected": Compression("expected_attention", kv_keep=0.4),
}
Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("shallow"), "gqa", LAYERS)


@pytest.fixture
def build(checkpoint: Path) -> Iterator[Build]:
    """Builds an engine on a device, with the same kernels wherever that is."""

    def engine(
        device: torch.device, shards: int = 1, kv_bytes: int = 8 << 20, on_advance: OnAdvance = unobserved
    ) -> Engine:
        return Engine(
            EngineConfig(
                checkpoint=str(checkpoint),
                dtype="float32",
                device=str(device),
                backend="reference",
                boundaries=BOUNDARIES[shards],
                kv_bytes=kv_bytes,
                host_bytes=8 << 20,
                max_sequences=16,
                max_prefill_tokens=256,
                schedule=LIFT_AT_ONCE,
            ),
            partial(connect_local, on_advance=on_advance, link=MemoryLink),
        )

    with pretending():
        yield engine


def generate(engine: Engine, requests: list[EngineRequest]) -> list[tuple[int, ...]]:
    replies = engine.generate(requests)
    engine.check_integrity()
    return [reply.token_ids for reply in replies]


def check_empty(engine: Engine) -> None:
    assert engine.idle
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


def prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, 259) for _ in range(length)]


def test_the_device_refuses_to_be_mixed() -> None:
    with pretending():
        there, here = torch.zeros(3, device=DEVICE), torch.zeros(3)
        with pytest.raises(MixedDevicesError, match=r"pretended.*cpu"):
            there + here
        with pytest.raises(MixedDevicesError):
            torch.nn.functional.embedding(torch.tensor([0]), torch.zeros(2, 2, device=DEVICE))
        assert there.to(CPU).device == here.device
        assert (there + 1).device == DEVICE


@pytest.mark.parametrize("shards", [1, 3])  # each takes half a minute
def test_every_policy_prefill_and_recall_in_one_batch(shards: int, build: Build) -> None:
    draw = random.Random(1)
    requests = [
        EngineRequest(
            prompt(draw, draw.randrange(40, 150)),
            Sampling(temperature=0.8 * (number % 3 == 2), top_p=0.9, top_k=50, seed=number),
            Stopping(42, ignore_eos=True),
            compression,
            trace=True,
        )
        for number, compression in enumerate(KINDS.values())
    ]
    engine = build(DEVICE, shards)
    assert generate(engine, requests) == generate(build(CPU, shards), requests)
    check_empty(engine)


@pytest.mark.parametrize("prefill", ["prune", "evict"])
def test_prompts_of_which_only_sinks_and_recent_tokens_stay(prefill: str, build: Build) -> None:
    """In the deepest layer nothing of the shorter one is scored, as there is no choice; of the other is."""
    few = {"min_context_length": 0, "recent_ratio": 0.9}
    requests = [
        EngineRequest(prompt(random.Random(length), length), stopping=Stopping(3), compression=compression)
        for length in (40, 200)
        for compression in (Compression("pyramid", prefill, parameters=few),)
    ]
    assert generate(build(DEVICE), requests) == generate(build(CPU), requests)


@pytest.mark.parametrize("shards", BOUNDARIES)
def test_sessions_of_every_kind(shards: int, build: Build) -> None:
    def talk(engine: Engine) -> list[tuple[int, ...]]:
        draw = random.Random(3)
        histories = {kind: prompt(draw, 80) for kind in SESSIONS}
        said = []
        for turn in range(3):
            replies = engine.generate(
                [
                    EngineRequest(ids, stopping=Stopping(9), compression=SESSIONS[kind], session_id=kind)
                    for kind, ids in histories.items()
                ]
            )
            engine.check_integrity()
            for kind, reply in zip(histories, replies, strict=True):
                assert bool(turn) == bool(reply.receipt.reused_tokens)
                said.append(reply.token_ids)
                histories[kind] += [*reply.token_ids, *prompt(draw, 9)]
        for kind in SESSIONS:
            engine.end_session(kind)
        check_empty(engine)
        return said

    assert talk(build(DEVICE, shards)) == talk(build(CPU, shards))


MAKING_ROOM = WITHOUT_RECALL | {"evict": replace(WITHOUT_RECALL["evict"], recall="step")}


def test_sequences_that_make_room(build: Build) -> None:
    draw = random.Random(7)
    requests = [
        EngineRequest(prompt(draw, 20), stopping=Stopping(60, ignore_eos=True), compression=compression)
        for compression in MAKING_ROOM.values()
    ]

    def run(device: torch.device) -> list[list[int]]:
        done = run_all_at_once(build(device, 2, 90 << 10), requests)
        assert sum(receipt.preemptions for _, receipt in done.values()) > 1
        return [tokens for tokens, _ in done.values()]

    assert run(DEVICE) == run(CPU)


def test_a_stream_that_is_closed(build: Build) -> None:
    engine = build(DEVICE, 2)
    stream = engine.stream(EngineRequest("abc " * 20, compression=POLICIES["evict"]))
    for _ in range(3):
        next(stream)
    stream.close()
    engine.check_integrity()
    check_empty(engine)


@dataclass(frozen=True)
class Budget:
    """Of a decode step of 4 sequences through 3 layers: launches, and how often the host waits.

    At the median, and at most, where chunks are compressed.
    """

    launches: int
    syncs: int
    most_launches: int
    most_syncs: int


# As it is: to be lowered, never raised.
BUDGETS = {
    "full": Budget(186, 4, 186, 4),
    "prune-keep": Budget(211, 4, 243, 6),
    "evict-keep": Budget(211, 4, 247, 6),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_decode_step_launches_and_waits_no_more_than_it_did(name: str, build: Build) -> None:
    steps: list[Counter[str]] = []

    def on_advance(kind: StepKind, seconds: float) -> None:
        if kind is StepKind.DECODE:
            steps.append(Counter(counts))
        counts.clear()

    engine = build(DEVICE, on_advance=on_advance)
    ids = prompt(random.Random(2), 100)
    request = EngineRequest(ids, stopping=Stopping(60, ignore_eos=True), compression=POLICIES[name])
    generate(engine, [request] * 4)
    launches, syncs = ([step[what] for step in steps] for what in ("launches", "syncs"))
    spent = Budget(round(median(launches)), round(median(syncs)), max(launches), max(syncs))
    assert dataclasses.astuple(spent) == dataclasses.astuple(BUDGETS[name])
