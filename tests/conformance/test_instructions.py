"""Instructions of a chat stay, in every layer and head, and answers follow them behind a long turn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pyramidserve.chat import Chat
from pyramidserve.types import ChatMessage, Compression, Stopping
from workers.bench.cell import BASELINE, Holding, read_cell
from workers.bench.facts import Asking, talks
from workers.bench.instructions import instructed
from workers.bench.parts.instructions import Instructions
from workers.budget.kv_share import KVShare
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.policies.floors import MOST
from workers.policies.registry import plan

LAYERS, FLOOR, KEEP = 6, 0.8, 0.4
# A toy's template has little of its own, and its tokens are bytes.
INSTRUCTIONS = len("system: Answer in verse, always.\nuser: ")
STOPPING = Stopping(max_tokens=40, ignore_eos=True)
ASKED = (ChatMessage("system", "Answer in verse, always."), ChatMessage("user", "What is a page? " * 8))
SCORING = [
    *(Compression("pyramid", prefill, kv_keep=KEEP) for prefill in ("prune", "evict")),
    *(Compression("defensive", prefill, kv_keep=KEEP) for prefill in ("prune", "evict")),
    *(Compression(name, kv_keep=KEEP) for name in ("h2o", "scissorhands", "snapkv", "tova", "keydiff")),
    Compression("expected_attention", kv_keep=KEEP),
]
NAMES = [f"{each.policy}/{each.prefill}".strip("/") for each in SCORING]


def lacking(compression: Compression, prompt: int, positions: Sequence[npt.NDArray[np.int32]]) -> int:
    """How many tokens of the instructions layers and heads lack of those that floors let stay."""
    keep = plan(compression, prompt, LAYERS)
    lacked = 0
    for layer, held in enumerate(positions):
        room = int(MOST * (min(keep.kept[layer], held.shape[1]) - keep.recent - keep.sinks))
        least = min(math.ceil(FLOOR * INSTRUCTIONS), room)
        lacked += sum(max(0, least - int((own < INSTRUCTIONS).sum())) for own in held)
    return lacked


def floored(compression: Compression) -> Compression:
    return replace(compression, parameters={"span_floor": FLOOR})


@pytest.mark.parametrize("compression", SCORING, ids=NAMES)
@pytest.mark.parametrize("shards", [1, 2])
def test_every_layer_and_head_keeps_its_share_of_instructions_turn_by_turn(
    compression: Compression, shards: int, toy_engine: Callable[..., Engine]
) -> None:
    engine = toy_engine("long", shards)
    compression = replace(floored(compression), recall="turn")
    messages = [*ASKED]
    for session_id, turn in (("", 0), ("s", 0), ("s", 1), ("s", 2)):
        request = EngineRequest(messages, stopping=STOPPING, compression=compression, trace=True)
        (traced,) = engine.trace([replace(request, session_id=session_id)])
        receipt = traced.reply.receipt
        assert (receipt.reused_tokens > 0) == (turn > 0)
        assert traced.traced is not None
        prefilled = [own for shard in traced.traced.shards for own in shard.positions]
        for positions in (prefilled, *([] if session_id else [traced.positions])):
            assert len(positions) == LAYERS
            assert lacking(compression, receipt.prompt_tokens, positions) == 0
        if session_id:
            messages += [ChatMessage("assistant", traced.reply.text), ChatMessage("user", "And then?")]
    engine.end_session("s")
    engine.check_integrity()


def test_without_floors_policies_drop_more_of_them(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine("long")
    lacked = {}
    for name, compression in zip(NAMES, SCORING, strict=True):
        (traced,) = engine.trace(
            [EngineRequest(ASKED, stopping=STOPPING, compression=compression, trace=True)]
        )
        lacked[name] = lacking(compression, traced.reply.receipt.prompt_tokens, traced.positions)
    assert sum(map(bool, lacked.values())) > len(lacked) / 2, lacked


def test_prompts_that_are_no_chats_are_kept_as_ever(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine("long")
    ids = engine.tokenizer.chat(Chat.of(ASKED))
    for compression in SCORING:
        replies = engine.trace(
            [
                EngineRequest(ids, stopping=STOPPING, compression=each, trace=True)
                for each in (compression, floored(compression))
            ]
        )
        plain, other = (each.positions for each in replies)
        assert all(np.array_equal(own, also) for own, also in zip(plain, other, strict=True))


def test_answers_follow_instructions_that_would_be_forgotten(embedded: Path) -> None:
    asking = Asking(Engine(EngineConfig(str(embedded), kv_bytes=256 << 20)))
    held = talks(asking.tokenizer, 400, 3, 1)
    part = Instructions(instructed(held, 1), 400)
    part.begin(asking)

    def gain(cell: str) -> float:
        found = part.measure(asking, Holding(read_cell(cell), KVShare(1.0)), None, lambda tokens: None)
        assert len(found["gains"]) == 12
        return sum(found["gains"])

    full = gain(BASELINE.name)
    assert full > 12
    for cell in ("snapkv{}@0.25", "defensive{}@0.2", "pyramid/evict{}@0.25"):
        plain, kept = gain(cell.format("")), gain(cell.format("[span_floor=0.5]"))
        assert kept > plain + 0.1 * full, (cell, plain / full, kept / full)
