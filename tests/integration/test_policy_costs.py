"""What accumulated attention costs beside that of a window, on the embedded model, measured in turns."""

from functools import partial
from pathlib import Path

from pyramidserve.types import Compression
from workers.bench.measure import Run, TurnLog, measure, warm_up
from workers.bench.workload import Workload, requests
from workers.engine.engine import Engine, EngineConfig
from workers.engine.pipeline import connect_local

WORKLOAD = Workload(2, 512, 64)
POLICIES = {
    "h2o": Compression("h2o", kv_keep=0.45),
    "snapkv": Compression("snapkv", kv_keep=0.45),
    "pyramid": Compression("pyramid", "evict", kv_keep=0.45),
}


def test_h2o_prefills_as_fast_as_snapkv_and_decodes_as_fast_as_pyramid(embedded: Path) -> None:
    log = TurnLog()
    config = EngineConfig(str(embedded), kv_bytes=256 << 20, host_bytes=256 << 20, max_sequences=2)
    engine = Engine(config, partial(connect_local, on_advance=log))
    runs: dict[str, list[Run]] = {name: [] for name in POLICIES}
    warm_up(engine, log, requests(Workload(1, 512, 8), engine.tokenizer, POLICIES["h2o"]))
    for _ in range(3):
        for name, compression in POLICIES.items():
            runs[name].append(measure(engine, log, requests(WORKLOAD, engine.tokenizer, compression)))
    prefill = {name: min(run.prefill_seconds for run in each) for name, each in runs.items()}
    step = {name: min(run.decode_step_p50 for run in each) for name, each in runs.items()}
    assert prefill["h2o"] <= 1.2 * prefill["snapkv"]
    assert step["h2o"] <= step["pyramid"] / 0.8
