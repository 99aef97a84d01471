"""Windows and frequencies by length are right in whatever a sequence goes through."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import LIFT_AT_ONCE, check_best
from transformers import AutoModelForCausalLM, PreTrainedModel

from pyramidserve.types import Compression, Reply, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest

# So little that much of what is within a window is on the host.
KEEPS_LITTLE = {"min_context_length": 8, "recent_ratio": 0.1, "prefill_decay_ratio": 0.2}
EVICT = Compression("pyramid", "evict", parameters=KEEPS_LITTLE)
PRUNE = replace(EVICT, prefill="prune")
FULL = Compression()
POLICIES = {
    "full": FULL,
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 40}),
    "evict": EVICT,
    "prune": PRUNE,
    "prune turn": replace(PRUNE, recall="turn"),
    "step": replace(EVICT, recall="step"),
    "turn": replace(EVICT, recall="turn"),
    "exact": replace(EVICT, recall="exact"),
}
WINDOWED = ("mistral-window", "qwen2-window", "smollm3-window")


def some(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 259) for _ in range(count)]


def theirs(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def ask(engine: Engine, ids: list[int], tokens: int, compression: Compression, session: str = "") -> Reply:
    stopping = Stopping(max_tokens=tokens, ignore_eos=True)
    (reply,) = engine.generate(
        [EngineRequest(ids, stopping=stopping, compression=compression, session_id=session)]
    )
    engine.check_integrity()
    return reply


def engine_on(folder: Path, backend: str = "auto") -> Engine:
    return Engine(
        EngineConfig(
            str(folder),
            dtype="float32",
            backend=backend,
            boundaries=(2,),
            kv_bytes=8 << 20,
            host_bytes=8 << 20,
            schedule=LIFT_AT_ONCE,
        )
    )


@pytest.mark.parametrize("kind", [*WINDOWED, "qwen3", "phi3-partial"])
def test_plain_torch_says_what_transformers_says(kind: str, toy: Callable[[str], Path]) -> None:
    engine, prompt = engine_on(toy(kind), backend="reference"), some(random.Random(1), 90)
    check_best(theirs(toy(kind)), prompt, ask(engine, prompt, 30, FULL).token_ids)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_ends_where_it_does_however_a_prompt_is_cut_into_blocks(
    kind: str, toy: Callable[[str], Path], toy_engine: Callable[..., Engine]
) -> None:
    model, engine, draw = theirs(toy(kind)), toy_engine(kind, 2, block_rows=16), random.Random(2)
    prompts = [some(draw, count) for count in (3, 17, 60, 130)]
    stopping = Stopping(max_tokens=40, ignore_eos=True)
    for name in ("full", "exact"):
        requests = [EngineRequest(ids, stopping=stopping, compression=POLICIES[name]) for ids in prompts]
        for prompt, reply in zip(prompts, engine.generate(requests), strict=True):
            check_best(model, prompt, reply.token_ids)
    engine.check_integrity()


@pytest.mark.parametrize("kind", ["mistral-window", "qwen2-window"])
@pytest.mark.parametrize("name", POLICIES)
def test_turns_of_a_model_with_windows_say_what_they_would_from_the_beginning(
    name: str, kind: str, toy: Callable[[str], Path]
) -> None:
    engine, model, draw = engine_on(toy(kind)), theirs(toy(kind)), random.Random(3)
    ids, left = some(draw, 60), 0
    for tokens, more in ((1, 30), (20, 3), (25, 9), (8, 1)):
        reply = ask(engine, ids, tokens, POLICIES[name], "s")
        assert reply.receipt.reused_tokens == left
        if name in ("full", "exact"):
            check_best(model, ids, reply.token_ids)
        left = len(ids) + tokens - 1
        ids = [*ids, *reply.token_ids, *some(draw, more)]
    if "prune" not in name:
        ids = [*ids[:40], 5, *ids[41:]]  # back to what was beyond the windows
        reply = ask(engine, ids, 5, POLICIES[name], "s")
        assert reply.receipt.reused_tokens == 40
        if name in ("full", "exact"):
            check_best(model, ids, reply.token_ids)
    engine.end_session("s")
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


def test_streaming_holds_no_more_than_a_window_and_says_the_same(
    toy: Callable[[str], Path], toy_engine: Callable[..., Engine]
) -> None:
    engine, prompt = toy_engine("mistral-window", 2), some(random.Random(4), 150)
    held = Compression("streaming", parameters={"sinks": 0, "window": 90})
    reply = ask(engine, prompt, 60, held)
    assert all(layer.prompt_kept + layer.generated_kept < 90 + 16 for layer in reply.receipt.layers)
    check_best(theirs(toy("mistral-window")), prompt, reply.token_ids)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "phi3-partial"])
def test_sequences_of_one_batch_have_the_frequencies_of_their_own_lengths(
    kind: str, toy: Callable[[str], Path], toy_engine: Callable[..., Engine]
) -> None:
    model, engine, draw = theirs(toy(kind)), toy_engine(kind, 2), random.Random(5)
    prompts = [some(draw, count) for count in (20, 150, 90, 180)]
    replies = engine.generate(
        [EngineRequest(ids, stopping=Stopping(max_tokens=20, ignore_eos=True)) for ids in prompts]
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        check_best(model, prompt, reply.token_ids)


@pytest.mark.parametrize(
    ("kind", "goes_on"),
    # A length below 100 or 128 tokens, one beyond, and another one.
    [("longrope", [False, True, False, True]), ("dynamic", [False, True, False, False])],
)
def test_a_turn_goes_on_where_its_frequencies_are_those_of_the_last(
    kind: str, goes_on: list[bool], toy: Callable[[str], Path], toy_engine: Callable[..., Engine]
) -> None:
    model, engine, draw = theirs(toy(kind)), toy_engine(kind, 2), random.Random(6)
    ids = some(draw, 40)
    for expected, more in zip(goes_on, (20, 90, 20, 0), strict=True):
        reply = ask(engine, ids, 15, FULL, "s")
        assert bool(reply.receipt.reused_tokens) == expected
        check_best(model, ids, reply.token_ids)
        ids = [*ids, *reply.token_ids, *some(draw, more)]
    engine.end_session("s")
