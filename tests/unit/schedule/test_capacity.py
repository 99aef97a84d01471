"""What is said to fit is what finds room."""

from dataclasses import replace

import pytest
from fake_head import stage
from fake_pipeline import Spoken

from pyramidserve.types import Compression, Sampling, StageState, Stopping
from workers.budget.footprint import ShardLayout
from workers.model.config import ModelConfig
from workers.model.shapes import SHAPES
from workers.policies.registry import plan
from workers.schedule.capacity import capacity
from workers.schedule.detokenizer import Detokenizer
from workers.schedule.memory import PipelineLayout, PipelineMemory
from workers.schedule.sequence import RunningSequence, SequenceRequest

CONTEXT, MOST = 600, 64


def model(context: int) -> ModelConfig:
    return replace(SHAPES["llama-2-7b"], layers=8, context=context)


EVICT = Compression("pyramid", "evict", kv_keep=0.45)
KINDS = {
    "full": Compression(),
    "prune": Compression("pyramid", "prune", kv_keep=0.45),
    "evict": EVICT,
    "step": Compression("pyramid", "evict", kv_keep=0.45, recall="step"),
    "exact": Compression("pyramid", "evict", kv_keep=0.45, recall="exact"),
}


def that_find_room(stages: list[StageState], compression: Compression) -> int:
    """How many sequences of the whole context the scheduler's own books have room for."""
    layout = PipelineLayout(
        shards=tuple(ShardLayout(each.first_layer, each.end_layer, each.page_bytes) for each in stages),
        pages=tuple(each.pages_total for each in stages),
        host_pages=tuple(each.host_bytes_limit // each.page_bytes for each in stages),
        layers=stages[-1].end_layer,
        max_sequences=MOST,
        max_sessions=0,
        max_prefill_tokens=CONTEXT,
    )
    memory = PipelineMemory(layout)
    for number in range(MOST):
        request = SequenceRequest(
            sequence=number,
            request_id="",
            prompt_ids=(1,) * (CONTEXT - 1),
            sampling=Sampling(),
            stopping=Stopping(max_tokens=1),
            compression=compression,
        )
        keep = plan(compression, CONTEXT - 1, layout.layers)
        sequence = RunningSequence(request, keep, Detokenizer(Spoken()), 0.0)
        if not (memory.add(sequence) and memory.hold([number], [0])):
            return number
    return MOST


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pages", "on_host"), [((900, 1300), (4000, 4000)), ((4000, 700), (100, 900)), ((9999,), (800,))]
)
def test_as_many_fit_as_are_said_to(kind: str, pages: tuple[int, ...], on_host: tuple[int, ...]) -> None:
    bounds = [0, 3, 8] if len(pages) == 2 else [0, 8]
    stages = [
        stage(first, end, count, host_pages=spilled)
        for first, end, count, spilled in zip(bounds[:-1], bounds[1:], pages, on_host, strict=True)
    ]
    fits = capacity(stages, MOST, model(CONTEXT), KINDS[kind])
    assert fits.tokens == CONTEXT
    assert fits.compressed == that_find_room(stages, KINDS[kind])
    assert fits.full == that_find_room(stages, Compression())


def test_the_host_counts_where_nothing_may_be_lost() -> None:
    roomy, tight = ([stage(0, 8, 9999, host_pages=on_host)] for on_host in (9999, 400))
    counts = [
        capacity(stages, MOST, model(CONTEXT), KINDS["exact"]).compressed for stages in (tight, roomy)
    ]
    assert 0 < counts[0] < counts[1]
    assert capacity(tight, MOST, model(CONTEXT), EVICT) == capacity(roomy, MOST, model(CONTEXT), EVICT)


def test_it_is_said_in_a_line() -> None:
    def told(compression: Compression, context: int = 4096, most: int = 200) -> str:
        return str(capacity([stage(0, 8, 24 * 2048)], most, model(context), compression))

    assert told(Compression()) == "24 sequences of 4,096 tokens with `full`"
    assert told(EVICT, 100_000) == "52 sequences of 4,096 tokens at keep 0.45; 24 with `full`"
    bound = told(KINDS["exact"], 600, 1)
    assert bound == "0 sequences of 600 tokens at keep 0.45 and recall exact; 1 with `full`"
    knobs = told(Compression("streaming"), most=30)
    assert knobs == "30 sequences (max_sequences) of 4,096 tokens with `streaming`; 24 with `full`"
    # In 32 bits a quarter of the bytes in 16 is an eighth of the tokens.
    eighth = capacity([stage(0, 8, 24 * 2048)], 200, model(4096), Compression("defensive", kv_keep=0.125))
    beside = "sequences of 4,096 tokens with `defensive/evict` at 0.25 of the bytes; 24 with `full`"
    assert told(Compression("auto", kv_bytes_keep=0.25)) == f"{eighth.compressed} {beside}"
