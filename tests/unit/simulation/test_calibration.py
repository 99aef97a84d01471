"""Costs that are known are found again; files that are something else are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_simulated_pipeline import COSTS, LIMITS, MODEL

from cluster.simulation.calibration import Measured, fit, machine, predict, read_measured
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.workload import Workload, named_workload
from workers.model.work import Limits, prefill_flops, weights_read
from workers.policies.registry import plan

FULL = Compression("full")


def measured(workload: Workload) -> Measured:
    """What a machine with COSTS would have measured."""
    prompt, requests = workload.prompt, workload.requests
    page = 16 * 2 * MODEL.kv_heads * MODEL.head_size * 4
    kv = requests * MODEL.layers * page * (prompt + workload.output / 2) / 16
    weights = weights_read(MODEL)
    step = COSTS.weights * weights * 4 / LIMITS.read_bytes_per_second
    step += COSTS.kv * kv / LIMITS.read_bytes_per_second
    step += COSTS.rows * 2 * weights * requests / LIMITS.flops_per_second
    flops = requests * prefill_flops(plan(FULL, prompt, MODEL.layers), MODEL)
    prefill = COSTS.prefill * flops / LIMITS.flops_per_second
    return Measured(
        name="w",
        model=MODEL,
        limits=LIMITS,
        itemsize=4,
        kv_dtype="float32",
        workload=workload,
        compression=FULL,
        pool_bytes=workload.pool_bytes(MODEL, 4),
        rows=requests,
        kv_bytes=kv,
        step_seconds=step,
        prefill_seconds=prefill,
        wall_seconds=prefill + step * (workload.output - 1),
    )


RUNS = [measured(Workload(*sizes)) for sizes in ((1, 512, 64), (8, 512, 64), (8, 64, 64), (2, 2048, 32))]


def test_the_costs_of_a_machine_are_found() -> None:
    assert dataclasses.astuple(fit(RUNS)) == pytest.approx(dataclasses.astuple(COSTS), rel=1e-6)


def test_no_cost_is_below_nothing() -> None:
    cheap = [dataclasses.replace(each, step_seconds=1e-3 / each.rows) for each in RUNS]
    assert min(dataclasses.astuple(fit(cheap))) >= 0


@pytest.mark.parametrize("sizes", [(4, 256, 100), (16, 128, 40), (1, 3000, 20)])
def test_another_workload_is_predicted(sizes: tuple[int, int, int]) -> None:
    other = measured(Workload(*sizes))
    assert predict(other, fit(RUNS), machine(RUNS)) == pytest.approx(other.wall_seconds, rel=0.05)


def test_the_machine_is_the_median_of_those_seen() -> None:
    runs = [dataclasses.replace(RUNS[0], limits=Limits(speed, 2 * speed)) for speed in (1.0, 5.0, 3.0)]
    assert machine(runs) == Limits(3.0, 6.0)


def written() -> dict[str, Any]:
    """A file of `bench engine`."""
    return {
        "workload": {"name": "W9", "requests": 4, "prompt": 100, "output": 11, "kv_bytes": 0},
        "model": dataclasses.asdict(MODEL),
        "machine": {"read_bytes_per_second": 1e9, "flops_per_second": 1e10},
        "compression": {"policy": "full", "prefill": "prune", "kv_keep": None, "recall": "off"},
        "pool_bytes": 1 << 20,
        "dtype": "bfloat16",
        "shards": 1,
        "wall_seconds": 3.0,
        "prefill_seconds": 1.0,
        "kv_bytes_decoding": 5000,
        "runs": [{"turns": {"decode": 20}}],
    }


def test_a_file_of_bench_engine_is_read(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps(written()))
    told = read_measured(file)
    assert told.model == MODEL
    assert (told.rows, told.step_seconds, told.itemsize) == (2.0, 0.1, 2)
    assert told.workload == Workload(4, 100, 11)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": 2}, "2 shards"),
        ({"runs": [{"turns": {"decode": 0}}]}, "0 decode steps"),
        ({"dtype": "int8"}, "KeyError.'int8'"),
        ({"machine": None}, "not what `bench engine --json` writes"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps(written() | change))
    with pytest.raises(InvalidRequestError, match=says) as refused:
        read_measured(file)
    assert str(file) in refused.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nothing\.json"):
        read_measured(tmp_path / "nothing.json")


def test_a_workload_has_a_name_or_sizes() -> None:
    assert named_workload("8x1024+64") == Workload(8, 1024, 64)
    assert named_workload("W1") == Workload(1, 512, 128)
    for name in ("W9", "0x5+5", "8x1024", ""):
        with pytest.raises(InvalidRequestError, match="REQUESTSxPROMPT"):
            named_workload(name)
