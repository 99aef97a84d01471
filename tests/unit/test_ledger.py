"""The books of one pipeline."""

from dataclasses import replace

import pytest
from fake_head import request

from cluster.ledger import PipelineLedger
from pyramidserve.errors import ConfigurationError
from pyramidserve.types import Compression, StageState
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.kv.pages import IntegrityError


def stage(first: int, end: int, pages: int = 8, page_bytes: int = 4096) -> StageState:
    return StageState(
        first_layer=first,
        end_layer=end,
        pid=1,
        node="n",
        pages_total=pages,
        pages_in_use=0,
        pages_reserved=0,
        page_bytes=page_bytes,
        host_bytes=0,
        host_bytes_limit=0,
        workspace_bytes=0,
        resident_bytes=0,
    )


def ledger(max_sequences: int = 4) -> PipelineLedger:
    """Two stages of one and two layers."""
    return PipelineLedger("p", [stage(0, 1), stage(1, 3)], max_sequences)


def test_a_request_needs_its_peak_of_every_stage() -> None:
    assert ledger().needs(request(pages=3)) == (3, 6)


def test_a_compressed_request_needs_less_of_deep_stages() -> None:
    books = PipelineLedger("p", [stage(0, 1, 999), stage(1, 2, 999)], 1)
    long = replace(request(), prompt_ids=(1,) * 1600, compression=Compression("pyramid", kv_keep=0.6))
    shallow, deep = books.needs(long)
    assert deep < shallow


def test_pages_are_promised_until_they_are_released() -> None:
    books = ledger()
    needs = books.needs(request(pages=3))
    books.reserve(1, needs)
    assert books.free == (5, 2)
    assert not books.fits(needs)
    assert books.could_ever_hold(needs)
    books.check_integrity()
    books.release(1)
    assert books.free == (8, 8)
    books.check_integrity()


def test_sequences_are_bounded() -> None:
    books = ledger(max_sequences=1)
    books.reserve(1, (1, 1))
    assert not books.fits((1, 1))


def test_a_promise_beyond_the_pool_is_refused() -> None:
    books = ledger()
    with pytest.raises(IntegrityError):
        books.reserve(1, (9, 0))
    books.reserve(1, (1, 1))
    with pytest.raises(IntegrityError):
        books.reserve(1, (1, 1))
    books.check_integrity()


def test_what_never_fits_is_told_by_its_tightest_stage() -> None:
    error = ledger().too_large(request(pages=5))
    assert error is not None
    assert "10 pages of stage 1 (layers 1 to 2)" in error.message
    assert "which has 8" in error.message
    assert "max_tokens (now 80)" in error.message
    assert ledger().too_large(request(pages=4)) is None


def test_the_state_joins_promises_and_what_the_head_reports() -> None:
    books = ledger()
    books.reserve(1, (2, 4))
    books.memory = [
        pb.StageMemory(pages_in_use=1, host_bytes=2, resident_bytes=3),
        pb.StageMemory(pages_in_use=4, host_bytes=5, resident_bytes=6),
    ]
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
