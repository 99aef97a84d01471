"""`prune` keeps what the authors' code keeps, on the embedded model in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest

# One recorded case, small enough to travel with the tests.
SMALL = Path(__file__).parents[1] / "data" / "recorded_prefill.json"


@pytest.fixture(scope="module", params=[(), (11,), (8, 20)], ids=["1-shard", "2-shards", "3-shards"])
def engine(request: pytest.FixtureRequest, embedded: Path) -> Engine:
    return Engine(
        EngineConfig(
            checkpoint=str(embedded),
            dtype="float32",
            boundaries=request.param,
            kv_bytes=256 << 20,
            host_bytes=256 << 20,
            max_sequences=2,
        )
    )


def _check(engine: Engine, recording: dict[str, Any]) -> None:
    for case in recording["cases"]:
        compression = Compression("pyramid", "prune", parameters={**case["params"]})
        prompt = recording["prompts"][case["prompt"]]
        (traced,) = engine.trace(
            [EngineRequest(prompt, stopping=Stopping(1), compression=compression, trace=True)]
        )
        assert traced.traced is not None
        kept = [p[0].tolist() for shard in traced.traced.shards for p in shard.positions]
        recorded = case["retained_positions_per_layer"]
        assert list(map(len, kept)) == list(map(len, recorded))
        same = sum(len(set(a) & set(b)) for a, b in zip(kept, recorded, strict=True))
        assert same / sum(map(len, recorded)) >= 0.999
        assert traced.traced.top.ids[0] == case["first_token_top8_ids"][0]
        assert traced.traced.top.logits == pytest.approx(case["first_token_top8_logits"], abs=1e-3)


def test_the_recorded_case_that_travels_along_is_met(engine: Engine) -> None:
    _check(engine, json.loads(SMALL.read_text()))


def test_every_recorded_case_is_met(engine: Engine, reference_file: Path) -> None:
    recording = json.loads(reference_file.read_text())
    assert len(recording["cases"]) == 9
    _check(engine, recording)
