"""What is drawn becomes output, a draft, or nothing, as its sequence and its step have it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_pipeline import request
from test_scheduler import running

from pyramidserve.types import Compression, FinishReason, Tokens
from workers.schedule.accept import accept
from workers.schedule.sequence import RunningSequence
from workers.schedule.step import Step, StepKind

EOS = 2
EXACT = Compression("streaming", parameters={"sinks": 2, "window": 20}, recall="exact")


def accepted(
    kind: StepKind, drawn: Sequence[int], *sequences: RunningSequence, rows: tuple[int, ...] = ()
) -> list[tuple[int, Tokens]]:
    keys = tuple(range(len(sequences)))
    rows = rows or (1,) * len(keys)
    draws = rows if kind is StepKind.VERIFY else (1,) * len(keys)
    step = Step(1, kind, keys, rows, draws=draws)
    return accept(step, drawn, dict(enumerate(sequences)), (EOS,), 5.0)


def test_a_prefill_and_a_decode_bring_one_output_each() -> None:
    one, other = running(request(0)), running(request(1))
    assert accepted(StepKind.PREFILL, (7, 8), one, other) == [
        (0, Tokens(0, (7,), "x")),
        (1, Tokens(0, (8,), "x")),
    ]
    assert accepted(StepKind.DECODE, (9,), one) == [(0, Tokens(1, (9,), "x"))]
    assert (one.output_ids, other.output_ids) == ([7, 9], [8])
    assert one.token_times == [5.0, 5.0]


def test_one_that_is_cancelled_tells_nothing_and_the_next_its_own() -> None:
    gone, here = running(request(0)), running(request(1))
    gone.cancelled = True
    assert accepted(StepKind.PREFILL, (7, 8), gone, here) == [(1, Tokens(0, (8,), "x"))]
    assert gone.output_ids == [7]  # its KV has what was fed, and is its session's


def test_nothing_follows_the_end() -> None:
    ended = running(replace(request(0, max_tokens=9), compression=EXACT))
    accepted(StepKind.PREFILL, (7,), ended)
    ended.drafts = [8, EOS, 9]
    assert accepted(StepKind.VERIFY, (8, EOS, 9, 10), ended, rows=(4,)) == [(0, Tokens(1, (8, EOS), "xx"))]
    assert ended.finish_reason is FinishReason.EOS


@pytest.mark.parametrize(
    ("drawn", "new"), [((8, 9, 10), (8, 9, 10)), ((8, 5, 10), (8, 5)), ((4, 5, 6), (4,))]
)
def test_of_a_verification_holds_what_follows_right_drafts(
    drawn: tuple[int, ...], new: tuple[int, ...]
) -> None:
    drafting = running(replace(request(0, max_tokens=50), compression=EXACT))
    accepted(StepKind.PREFILL, (7,), drafting)
    assert accepted(StepKind.DECODE, (8,), drafting) == []
    assert accepted(StepKind.DECODE, (9,), drafting) == []
    assert drafting.drafts == [8, 9]
    assert accepted(StepKind.VERIFY, drawn, drafting, rows=(3,)) == [(0, Tokens(1, new, "x" * len(new)))]
    assert drafting.output_ids == [7, *new]
    assert drafting.drafts == []


def test_known_output_is_taken_in_without_being_told_again() -> None:
    resumed = running(request(0, max_tokens=9, forced=(7, 8, 9)))
    assert accepted(StepKind.PREFILL, (7,), resumed) == []
    # A decode feeds the newest and those known behind it, and draws one behind them.
    assert accepted(StepKind.DECODE, (10,), resumed, rows=(3,)) == [(0, Tokens(3, (10,), "x"))]
    assert resumed.output_ids == [7, 8, 9, 10]
