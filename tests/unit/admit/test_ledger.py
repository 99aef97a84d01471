"""The books of one pipeline."""

from dataclasses import replace

import pytest
from fake_head import request, stage

from cluster.admit.ledger import PipelineLedger
from cluster.admit.tuning import AdmitTuning
from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression, StageState, Stopping
from pyramidserve.v1 import pipeline_pb2 as pb


def ledger(max_sequences: int = 4) -> PipelineLedger:
    """Two stages of one and two layers."""
    return PipelineLedger("p", [stage(0, 1), stage(1, 3)], max_sequences)


def test_a_request_grows_on_every_stage() -> None:
    more = ledger().growth(replace(request(pages=3), stopping=Stopping(max_tokens=48)), 32)
    assert (more.first, more.expected, more.most) == ((3, 6, 0, 0), (4, 8, 0, 0), (5, 10, 0, 0))


def test_a_compressed_request_needs_less_of_deep_stages() -> None:
    books = PipelineLedger("p", [stage(0, 1, 999), stage(1, 2, 999)], 1)
    long = replace(request(), prompt_ids=(1,) * 1600, compression=Compression("pyramid", kv_keep=0.6))
    shallow, deep = books.growth(long, 1).most[:2]
    assert deep < shallow


def test_pages_are_counted_on_until_the_sequence_is_gone() -> None:
    books = ledger()
    more = books.growth(request(pages=3), 16)
    books.add(1, more)
    assert books.free == (5, 2)
    assert not books.fits(more)
    assert books.could_ever_hold(more)
    books.remove(1)
    assert books.free == (8, 8)


@pytest.mark.parametrize(("horizon", "fit"), [(0.5, 3), (1.0, 2)])
def test_sequences_are_counted_at_the_horizon(horizon: float, fit: int) -> None:
    books = PipelineLedger("p", [stage(0, 1, 10)], 9, AdmitTuning(horizon=horizon))
    more = books.growth(replace(request(pages=1), stopping=Stopping(max_tokens=65)), 65)
    assert (more.first, more.expected) == ((1, 0), (5, 0))
    for number in range(9):
        if books.fits(more):
            books.add(number, more)
    assert len(books) == fit


def test_what_a_request_must_not_lose_needs_room_on_the_hosts() -> None:
    stages = [stage(0, 1, 100, host_pages=9), stage(1, 3, 100, host_pages=18)]
    books = PipelineLedger("p", stages, 4)
    window = {"sinks": 1, "window": 15}
    exact = Compression("streaming", parameters=window, recall="exact")
    long = replace(request(), prompt_ids=(1,) * 112, compression=exact)
    more = books.growth(long, 16)
    assert more.most[2:] == (6, 12)
    books.add(1, more)
    assert not books.fits(more)
    assert books.fits(books.growth(replace(long, compression=replace(exact, recall="off")), 16))
    assert books.share((50, 20, 9, 9)) == 0.5
    error = books.too_large(replace(long, prompt_ids=(1,) * 200))
    assert error is not None
    assert "needs 12 pages of host memory of stage 0 of pipeline p, which has 9" in error.message


def test_sequences_are_bounded() -> None:
    books = ledger(max_sequences=1)
    more = books.growth(request(), 16)
    books.add(1, more)
    assert not books.fits(more)


def test_what_never_fits_is_told_by_its_tightest_stage() -> None:
    error = ledger().too_large(request(pages=5))
    assert error is not None
    assert "10 pages of stage 1 (layers 1 to 2)" in error.message
    assert "which has 8" in error.message
    assert "max_tokens (now 16)" in error.message
    assert ledger().too_large(request(pages=4)) is None


def test_the_state_joins_promises_and_what_the_head_reports() -> None:
    books = ledger()
    books.add(1, books.growth(request(pages=2), 16))
    books.take(
        [
            pb.StageMemory(pages_in_use=1, host_bytes=2, resident_bytes=3),
            pb.StageMemory(pages_in_use=4, host_bytes=5, resident_bytes=6),
        ]
    )
    state = books.state()
    assert (state.pipeline_id, state.sequences, state.max_sequences) == ("p", 1, 4)
    first, second = state.stages
    assert (first.pages_reserved, first.pages_in_use, first.host_bytes, first.resident_bytes) == (
        2,
        1,
        2,
        3,
    )
    assert (second.pages_reserved, second.pages_in_use) == (4, 4)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([(0, 0)], "has 2 stages and reports the memory of 1"),
        ([(0, 0), (9, 0)], "stage 1 of pipeline 'p' reports 9 of 8 pages"),
        ([(-1, 0), (0, 0)], "stage 0 of pipeline 'p' reports -1 of 8 pages"),
        ([(0, -5), (0, 0)], "-5 bytes of host memory"),
    ],
)
def test_a_head_that_tells_what_cannot_be_is_not_believed(
    told: list[tuple[int, int]], message: str
) -> None:
    books = ledger()
    with pytest.raises(InvalidRequestError, match=message):
        books.take([pb.StageMemory(pages_in_use=pages, host_bytes=size) for pages, size in told])
    assert not books.memory


@pytest.mark.parametrize(
    ("pipeline_id", "stages", "max_sequences"),
    [
        ("", [stage(0, 1)], 1),
        ("p", [], 1),
        ("p", [stage(0, 1)], 0),
        ("p", [stage(1, 2)], 1),
        ("p", [stage(0, 2), stage(1, 3)], 1),
        ("p", [stage(0, 1), stage(1, 1)], 1),
        ("p", [stage(0, 1, pages=0)], 1),
        ("p", [stage(0, 1, page_bytes=0)], 1),
    ],
)
def test_stages_that_make_no_pipeline_are_refused(
    pipeline_id: str, stages: list[StageState], max_sequences: int
) -> None:
    with pytest.raises(ConfigurationError, match="they must cover the layers in order"):
        PipelineLedger(pipeline_id, stages, max_sequences)
