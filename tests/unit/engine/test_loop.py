"""The engine's loop over a pipeline without a model: what is reported, and when a sequence ends."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from fake_pipeline import FakePipeline, Spoken, layout, request

from pyramidserve.types import DeviceBytes, FinishReason, Receipt, Stopping
from workers.engine import loop as loop_module
from workers.engine.loop import (
    EngineLoop,
    LoopEvent,
    SequenceCancelled,
    SequenceFinished,
    SequenceTokens,
    SequenceTraced,
)
from workers.schedule.sequence import SequenceRequest
from workers.schedule.step import PrefillTrace, TopLogits

EOS = 0


def says(*texts: str) -> Callable[[int, int], int]:
    """A script in which sequence n says ``texts[n]``, byte by byte, and EOS behind it."""
    return lambda sequence, index: [*texts[sequence].encode(), *[EOS] * 100][index]


def engine(pipeline: FakePipeline, max_sequences: int = 8) -> EngineLoop:
    return EngineLoop(layout(pipeline.shards, max_sequences), pipeline, Spoken(), (EOS,))


def run(loop: EngineLoop) -> list[LoopEvent]:
    events: list[LoopEvent] = []
    while not loop.idle:
        events += loop.advance()
    assert len(loop.scheduler.memory) == 0
    return events


def reply(wanted: SequenceRequest, text: str) -> tuple[str, list[int], Receipt]:
    """Text, output indices and receipt of one request that is alone."""
    loop = engine(FakePipeline(says(text)))
    assert loop.admit(wanted)
    *events, finished = run(loop)
    assert isinstance(finished, SequenceFinished)
    tokens = [event.tokens for event in events if isinstance(event, SequenceTokens)]
    assert len(tokens) == len(events)
    assert all(len(part.token_ids) == 1 for part in tokens)
    return "".join(part.text for part in tokens), [part.index for part in tokens], finished.receipt


@pytest.mark.parametrize(
    ("wanted", "text", "expected", "output_tokens", "reason", "stop"),
    [
        (request(0, max_tokens=9), "abc", "abc\0", 4, FinishReason.EOS, ""),
        (request(0, max_tokens=6, ignore_eos=True), "abc", "abc\0\0\0", 6, FinishReason.LENGTH, ""),
        (request(0, max_tokens=2), "abc", "ab", 2, FinishReason.LENGTH, ""),
        (request(0, max_tokens=3), "abc", "abc", 3, FinishReason.LENGTH, ""),
        (request(0, max_tokens=1), "", "\0", 1, FinishReason.EOS, ""),
        (request(0, max_tokens=9, stop=("END",)), "ab END c", "ab ", 6, FinishReason.STOP, "END"),
        (request(0, max_tokens=9, stop=("END", "b")), "ab END", "a", 2, FinishReason.STOP, "b"),
        (request(0, max_tokens=4, stop=("END",)), "abEN", "abEN", 4, FinishReason.LENGTH, ""),
        (request(0, max_tokens=5, stop=("END",)), "abEND", "ab", 5, FinishReason.STOP, "END"),
        (request(0, max_tokens=3), "aé", "aé", 3, FinishReason.LENGTH, ""),
        (request(0, max_tokens=2), "aé", "a\N{REPLACEMENT CHARACTER}", 2, FinishReason.LENGTH, ""),
    ],
)
def test_a_sequence_ends_where_its_request_says(
    wanted: SequenceRequest, text: str, expected: str, output_tokens: int, reason: FinishReason, stop: str
) -> None:
    said, indices, receipt = reply(wanted, text)
    assert said == expected
    assert indices == list(range(output_tokens))
    assert (receipt.output_tokens, receipt.finish_reason) == (output_tokens, reason)
    assert receipt.stop_string == stop


@pytest.mark.parametrize(
    ("ids", "ignore_eos", "output", "reason"),
    [
        ((ord("b"), ord("z")), False, "ab", FinishReason.STOP),
        ((ord("z"),), False, "abc\0", FinishReason.EOS),
        ((EOS,), True, "abc\0", FinishReason.STOP),
        ((EOS,), False, "abc\0", FinishReason.EOS),
    ],
)
def test_a_sequence_ends_with_a_stop_id(
    ids: tuple[int, ...], ignore_eos: bool, output: str, reason: FinishReason
) -> None:
    wanted = request(0, max_tokens=9)
    stopping = Stopping(9, ignore_eos=ignore_eos, stop_token_ids=ids)
    said, _, receipt = reply(replace(wanted, stopping=stopping), "abc")
    assert (said, receipt.finish_reason) == (output, reason)


def test_a_stop_string_behind_which_a_character_is_unfinished_still_ends_the_text() -> None:
    pieces = (b"a", b"END\xf0")
    pipeline = FakePipeline(lambda sequence, index: index)
    said = Spoken(lambda ids: b"".join(pieces[i] for i in ids if i < 2).decode("utf-8", "replace"))
    loop = EngineLoop(layout(), pipeline, said, ())
    assert loop.admit(request(1, max_tokens=2, stop=("END",)))
    *tokens, finished = run(loop)
    assert [event.tokens.text for event in tokens if isinstance(event, SequenceTokens)] == ["a", ""]
    assert isinstance(finished, SequenceFinished)
    assert (finished.receipt.finish_reason, finished.receipt.stop_string) == (FinishReason.STOP, "END")


@pytest.mark.parametrize("known", range(6))
def test_forced_output_is_not_reported_and_goes_on_at_its_index(known: int) -> None:
    text = "abcde"
    forced = tuple(text.encode()[:known])
    said, indices, receipt = reply(request(0, max_tokens=5, forced=forced), "?????"[:known] + text[known:])
    assert said == text[known:]
    assert indices == list(range(known, 5))
    assert (receipt.output_tokens, receipt.finish_reason) == (5, FinishReason.LENGTH)


def test_text_of_forced_output_that_was_held_back_is_reported_later() -> None:
    wanted = request(0, max_tokens=4, stop=("STOP",), forced=tuple(b"aST"))
    assert reply(wanted, "???x")[:2] == ("STx", [3])


@pytest.mark.parametrize("shards", [1, 3])
def test_sequences_of_a_batch_do_not_mix(shards: int) -> None:
    texts = ("first", "the second", "3", "fourth of them", "")
    pipeline = FakePipeline(says(*texts), shards)
    loop = engine(pipeline)
    for key in range(len(texts)):
        assert loop.admit(request(key, 1 + 2 * key, 20))
    said = dict.fromkeys(range(len(texts)), "")
    for event in run(loop):
        if isinstance(event, SequenceTokens):
            said[event.sequence] += event.tokens.text
    assert tuple(said.values()) == tuple(text + "\0" for text in texts)
    assert len({step.number for step, _ in pipeline.submitted}) == len(pipeline.submitted)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("moment", range(14))
def test_a_cancelled_sequence_says_nothing_more_and_ends_once(shards: int, moment: int) -> None:
    loop = engine(FakePipeline(says("abcd", "efgh", "ijkl"), shards))
    for key in range(3):
        assert loop.admit(request(key, 6, 9))
    for _ in range(moment):
        loop.advance()
    alive = 1 in loop.scheduler.sequences
    events = loop.cancel(1) + loop.cancel(1) + run(loop)
    assert not any(isinstance(event, SequenceTokens) and event.sequence == 1 for event in events)
    assert [event for event in events if event == SequenceCancelled(1)] == [SequenceCancelled(1)] * alive
    assert not any(isinstance(event, SequenceFinished) and event.sequence == 1 for event in events)


def test_there_is_nothing_to_wait_for_without_sequences() -> None:
    loop = engine(FakePipeline(says()))
    assert loop.idle
    assert loop.advance() == []
    assert loop.cancel(4) == []


def test_a_sequence_without_room_is_not_admitted() -> None:
    loop = engine(FakePipeline(says("a", "b")), max_sequences=1)
    assert loop.admit(request(0))
    assert not loop.admit(request(1))
    assert {event.sequence for event in run(loop)} == {0}
    assert loop.admit(request(1))


def test_a_receipt_sums_up_what_all_shards_report(monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock strikes 1, 2, 4, 8, …: at admission, and whenever a step comes back with tokens.
    ticks = (float(2**tick) for tick in count())
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    pipeline = FakePipeline(says("abcd"), shards=2)
    loop = engine(pipeline)
    assert loop.admit(request(0, 3, 4, forced=(97,)))
    (receipt,) = (event.receipt for event in run(loop) if isinstance(event, SequenceFinished))
    assert receipt.peak_device_bytes == DeviceBytes(
        kv=7 * 100 + 7 * 101, scores=2 * 100 + 2 * 101, tables=60, prefill_workspace=140
    )
    assert (receipt.spilled_bytes, receipt.recalled_bytes, receipt.dropped_bytes) == (80, 100, 120)
    assert [layer.layer for layer in receipt.layers] == [0, 1, 2, 3]
    assert (receipt.request_id, receipt.seed, receipt.prompt_tokens) == ("request 0", 7, 3)
    assert (receipt.policy, receipt.kv_keep_target, receipt.kv_keep_reached) == ("full", None, 1.0)
    # Tokens came at 2 (forced), 4, 8 and 16.
    assert receipt.time_to_first_token == 4 - 1
    assert receipt.inter_token_p50 == 4
    assert receipt.inter_token_p99 == 8
    assert loop.memory[0].pages_in_use == pipeline.submitted[-1][0].number


def test_a_trace_brings_what_each_shard_kept_of_its_sequence() -> None:
    traces = [PrefillTrace(key, (np.array([key], dtype=np.int32),)) for key in (0, 1, 0, 1)]
    top = TopLogits(1, (4, 5), (0.5, 0.25))
    pipeline = FakePipeline(says("a", "b"))
    pipeline.traces, pipeline.top_logits = tuple(traces), (top,)
    loop = engine(pipeline)
    for key in range(2):
        assert loop.admit(request(key, trace=key == 1))
    (traced,) = (event for event in run(loop) if isinstance(event, SequenceTraced))
    assert traced.sequence == 1
    assert traced.top == top
    assert traced.shards == (traces[1], traces[3])
