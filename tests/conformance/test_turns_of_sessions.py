"""A turn goes on with what the last has left, and says what it would have said from the beginning."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from toy import LIFT_AT_ONCE

from pyramidserve.types import Compression, Stopping, Tokens
from workers.engine.engine import Engine, EngineConfig, EngineRequest, TracedReply
from workers.engine.loop import SequenceFinished
from workers.policies.registry import plan

PARAMETERS = {"min_context_length": 8}
EVICT = Compression("pyramid", "evict", parameters=PARAMETERS)
POLICIES = {
    "full": Compression(),
    "streaming": Compression("streaming", parameters={"sinks": 2, "window": 40}),
    "evict": EVICT,
    "prune": Compression("pyramid", "prune", parameters=PARAMETERS),
    "prune turn": Compression("pyramid", "prune", parameters=PARAMETERS, recall="turn"),
    "step": replace(EVICT, recall="step"),
    "turn": replace(EVICT, recall="turn"),
    "exact": replace(EVICT, recall="exact"),
    "heads": Compression("h2o", kv_keep=0.4, parameters={"drop": 5}),
    "heads turn": Compression("h2o", kv_keep=0.4, recall="turn", parameters={"drop": 5}),
    "heads exact": Compression("snapkv", kv_keep=0.4, recall="exact", parameters={"window_size": 8}),
}
# Other tokens in each head cannot be taken back together.
TAKEN_BACK = {name: 0 if name.startswith(("prune", "heads")) else 40 for name in POLICIES}


def ask(engine: Engine, ids: list[int], compression: Compression, tokens: int, session: str) -> TracedReply:
    request = EngineRequest(
        ids,
        stopping=Stopping(max_tokens=tokens, ignore_eos=True),
        compression=compression,
        session_id=session,
        trace=True,
    )
    (traced,) = engine.trace([request])
    engine.check_integrity()
    return traced


def some(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 259) for _ in range(count)]


def end(engine: Engine) -> None:
    engine.end_session("s")
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_turns_compute_only_what_is_new(name: str, shards: int, toy_engine: Callable[..., Engine]) -> None:
    engine, draw, compression = toy_engine(shards=shards), random.Random(3), POLICIES[name]
    ids, left = some(draw, 60), 0
    for tokens, more in ((1, 30), (20, 3), (25, 9), (8, 1)):
        reply = ask(engine, ids, compression, tokens, "s").reply
        assert reply.receipt.reused_tokens == left
        if name in ("full", "exact", "heads exact"):
            assert reply.token_ids == ask(engine, ids, Compression(), tokens, "").reply.token_ids
        counts = [layer.prompt_kept for layer in reply.receipt.layers]
        assert all(
            count <= most for count, most in zip(counts, plan(compression, len(ids), 6).kept, strict=True)
        )
        left = len(ids) + tokens - 1
        ids = [*ids, *reply.token_ids, *some(draw, more)]
    changed = [*ids[:40], 5, *ids[41:]]
    reply = ask(engine, changed, compression, 5, "s").reply
    assert reply.receipt.reused_tokens == TAKEN_BACK[name]
    if name in ("full", "exact", "heads exact"):
        assert reply.token_ids == ask(engine, changed, Compression(), 5, "").reply.token_ids
    end(engine)


@pytest.mark.parametrize("name", POLICIES)
def test_a_turn_that_is_cancelled_leaves_what_one_of_its_length_would(
    name: str, toy_engine: Callable[..., Engine]
) -> None:
    engine, draw, compression = toy_engine(shards=2), random.Random(7), POLICIES[name]
    first = some(draw, 60)
    second = [*first, *ask(engine, first, compression, 9, "s").reply.token_ids, *some(draw, 10)]
    ask(engine, first, compression, 9, "whole")
    stopping = Stopping(max_tokens=60, ignore_eos=True)
    stream = engine.stream(
        EngineRequest(second, stopping=stopping, compression=compression, session_id="s")
    )
    output: list[int] = []
    for event in stream:
        output += event.token_ids if isinstance(event, Tokens) else []
        if len(output) >= 20:
            break
    stream.close()
    engine.check_integrity()
    session = engine.loop.scheduler.parked.get("s")
    assert session is not None
    assert session.ids[len(second) :] == tuple(output[: session.generated])
    # The step that was under way counts.
    whole = ask(engine, second, compression, session.generated + 1, "whole").reply
    assert whole.token_ids[: session.generated] == session.ids[len(second) :]
    third = [*session.ids, *some(draw, 8)]
    replies = [ask(engine, third, compression, 12, each).reply for each in ("s", "whole")]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].receipt.reused_tokens == replies[1].receipt.reused_tokens == len(session.ids)
    engine.end_session("whole")
    end(engine)


def test_a_session_that_ends_while_its_turns_wait_and_run_leaves_nothing(
    toy_engine: Callable[..., Engine],
) -> None:
    engine = toy_engine(shards=2)
    numbers = []
    for _ in range(2):
        request = EngineRequest([5, 6, 7], stopping=Stopping(20, ignore_eos=True), session_id="s")
        numbers.append(engine.submit(request)[0])
        events = engine.step() if len(numbers) == 1 else []
    engine.end_session("s")
    while not engine.idle:
        events += engine.step()
    assert {event.sequence for event in events if isinstance(event, SequenceFinished)} == set(numbers)
    assert not engine.loop.scheduler.parked
    end(engine)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("name", [*POLICIES, "keydiff"])
def test_a_turn_whose_output_was_known_leaves_what_it_would_have(
    name: str, stops: bool, toy_engine: Callable[..., Engine]
) -> None:
    """The last output is never fed; one that ends before all that is known leaves nothing."""
    keydiff = Compression("keydiff", parameters={"tokens": 30, "drop": 4})
    compression = {**POLICIES, "keydiff": keydiff}[name]
    engine, draw = toy_engine(shards=2), random.Random(5)
    first, known = some(draw, 60), some(draw, 28)
    stopping = Stopping(len(known), ignore_eos=True, stop_token_ids=known[9:10] if stops else ())
    request = EngineRequest(
        first, stopping=stopping, compression=compression, session_id="s", resume_output_ids=tuple(known)
    )
    (reply,) = engine.generate([request])
    engine.check_integrity()
    assert reply.receipt.output_tokens == (10 if stops else 28)
    second = [*first, *known[: reply.receipt.output_tokens], *some(draw, 5)]
    again = ask(engine, second, compression, 12, "s").reply
    left = len(first) + reply.receipt.output_tokens - 1
    # Where known output is verified, what was not reached is taken back.
    alone = name in ("step", "exact", "heads exact")
    assert again.receipt.reused_tokens == (left if not stops or alone else 0)
    if name in ("full", "exact", "heads exact"):
        assert again.token_ids == ask(engine, second, Compression(), 12, "").reply.token_ids
    end(engine)


@pytest.mark.parametrize(
    "compression",
    [
        Compression("pyramid", "evict", kv_keep=1.0),
        Compression("pyramid", "prune", kv_keep=1.0),
        Compression("streaming", parameters={"sinks": 2, "window": 20}, recall="turn"),
        POLICIES["turn"],
        POLICIES["exact"],
        POLICIES["heads turn"],
    ],
    ids=[
        *("evict everything kept", "prune everything kept", "streaming turn", "evict turn", "evict exact"),
        "heads turn",
    ],
)
def test_a_turn_that_has_all_kv_at_hand_begins_as_the_full_cache_does(
    compression: Compression, toy_engine: Callable[..., Engine]
) -> None:
    engine, draw = toy_engine(shards=2), random.Random(4)
    ids = some(draw, 90)
    for _ in range(5):
        traced = ask(engine, ids, compression, 1, "s")
        full = ask(engine, ids, Compression(), 1, "")
        assert traced.traced
        assert full.traced
        assert traced.traced.top.ids == full.traced.top.ids
        assert traced.traced.top.logits == pytest.approx(full.traced.top.logits, abs=1e-4)
        ids = [*ids, *some(draw, draw.choice([1, 7, 60]))][:230]
    if compression.recall != "off":
        assert traced.reply.receipt.recalled_bytes > 0
    end(engine)


# Drops nothing but before the last of six layers.
LATE = {"min_context_length": 8, "prefill_decay_ratio": 0.4, "layerwise_downsample_interval": 4}


@pytest.mark.parametrize("boundaries", [(), (5,), (2, 4)], ids=str)
def test_lifted_rows_get_the_keys_and_values_that_they_would_have_had(
    boundaries: tuple[int, ...], toy: Callable[[str], Path]
) -> None:
    engine = Engine(
        EngineConfig(
            checkpoint=str(toy("gqa")),
            dtype="float32",
            boundaries=boundaries,
            kv_bytes=8 << 20,
            host_bytes=8 << 20,
            schedule=LIFT_AT_ONCE,
        )
    )
    prune = Compression("pyramid", "prune", parameters=LATE, recall="turn")
    draw = random.Random(8)
    ids = some(draw, 100)
    ask(engine, ids, prune, 1, "s")
    for more in (5, 60, 1):
        ids = [*ids, *some(draw, more)]
        traced, full = ask(engine, ids, prune, 1, "s"), ask(engine, ids, Compression(), 1, "")
        assert traced.traced
        assert full.traced
        assert traced.traced.top.logits == pytest.approx(full.traced.top.logits, abs=1e-4)
        last = traced.reply.receipt.layers[-1]
        assert last.prompt_kept < len(ids)
        assert last.dropped == 0
    end(engine)


def test_a_history_is_prefilled_again_until_that_has_cost_as_much_as_lifting_it(
    toy: Callable[[str], Path],
) -> None:
    compression, draw = Compression("pyramid", "prune", kv_keep=0.6, recall="turn"), random.Random(5)
    engine = Engine(EngineConfig(str(toy("gqa")), dtype="float32", kv_bytes=8 << 20, host_bytes=8 << 20))
    ids, reused = some(draw, 200), []
    for _ in range(8):
        traced, anew = (ask(engine, ids, compression, 1, session) for session in ("s", ""))
        receipt = traced.reply.receipt
        reused.append(receipt.reused_tokens)
        if not reused[-1]:  # as if it had no past
            assert receipt.recalled_bytes == 0
            assert traced.reply.token_ids == anew.reply.token_ids
            assert receipt.layers == anew.reply.receipt.layers
        ids = [*ids, *some(draw, 3)]
    lifted = next(turn for turn, tokens in enumerate(reused) if tokens)
    assert lifted > 1
    assert reused == [0] * lifted + [200 + 3 * turn for turn in range(lifted - 1, 7)]
    end(engine)


def test_without_recall_a_turn_does_without_what_was_evicted(toy_engine: Callable[..., Engine]) -> None:
    engine, draw = toy_engine(), random.Random(4)
    ids = some(draw, 90)
    ask(engine, ids, EVICT, 1, "s")
    ids = [*ids, *some(draw, 7)]
    traced, full = ask(engine, ids, EVICT, 1, "s"), ask(engine, ids, Compression(), 1, "")
    assert traced.traced
    assert full.traced
    assert traced.traced.top.logits != pytest.approx(full.traced.top.logits, abs=1e-2)
    assert traced.reply.receipt.recalled_bytes == 0
    end(engine)


@pytest.mark.parametrize("name", POLICIES)
def test_sessions_that_move_to_the_host_say_what_they_would_have_said(
    name: str, toy: Callable[[str], Path]
) -> None:
    """Three sessions take turns in a pool that holds little more than one."""

    def replies(kv_bytes: int) -> tuple[list[tuple[int, ...]], int]:
        engine = Engine(
            EngineConfig(
                checkpoint=str(toy("gqa")),
                dtype="float32",
                boundaries=(2,),
                kv_bytes=kv_bytes,
                host_bytes=8 << 20,
                schedule=LIFT_AT_ONCE,
            )
        )
        moved = 0
        for stage in engine.stages:
            suspend = stage.cache.suspend

            def watched(sequence: int, suspend: Callable[[int], None] = suspend) -> None:
                nonlocal moved
                moved += 1
                suspend(sequence)

            stage.cache.suspend = watched  # type: ignore[method-assign]
        draw = random.Random(6)
        histories = [some(draw, 100) for _ in range(3)]
        told = []
        for _ in range(4):
            for number, ids in enumerate(histories):
                reply = ask(engine, ids, POLICIES[name], 12, str(number)).reply
                told.append(reply.token_ids)
                assert reply.receipt.reused_tokens == (len(ids) - 13 if len(ids) > 100 else 0)
                ids += [*reply.token_ids, *some(draw, 12)]
        return told, moved

    roomy, never = replies(8 << 20)
    tight, often = replies(160 << 10 if name == "streaming" else 360 << 10)
    assert roomy == tight
    assert never == 0 < often
