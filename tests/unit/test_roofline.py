"""The least time of a workload, counted by hand."""

import dataclasses

import pytest

from workers.bench.measure import Run
from workers.bench.roofline import floor
from workers.bench.workload import Workload
from workers.budget.plan import KeepPlan
from workers.model.shapes import SHAPES
from workers.model.work import Limits, prefill_flops

MODEL = dataclasses.replace(
    SHAPES["toy"],
    layers=2,
    hidden=4,
    heads=2,
    kv_heads=1,
    head_size=2,
    intermediate=8,
    vocabulary=10,
    context=64,
    eos_ids=(),
)
FULL = KeepPlan(10, (10, 10), 10)


def test_only_rows_that_are_computed_count() -> None:
    qkv, rest = 2 * 4 * (4 + 2 * 2), 2 * 4 * (4 + 3 * 8)
    attention = 2 * 4
    # The last layer's output is needed of the last row alone.
    assert prefill_flops(FULL, MODEL) == 2 * (10 * qkv + 100 * attention) + (10 + 1) * rest
    pruned = KeepPlan(10, (10, 4), 2, drops_hidden_states=True)
    expected = (10 + 4) * qkv + (100 + 16) * attention + (4 + 1) * rest
    assert prefill_flops(pruned, MODEL) == expected
    evicted = dataclasses.replace(pruned, drops_hidden_states=False)
    assert prefill_flops(evicted, MODEL) == prefill_flops(FULL, MODEL)


@pytest.mark.parametrize(("bandwidth", "bound"), [(1e3, "memory"), (1e9, "products")])
def test_a_decode_step_is_bound_by_memory_or_by_products(bandwidth: float, bound: str) -> None:
    names = {field.name: 0.0 for field in dataclasses.fields(Run)}
    run = Run(**(names | {"turns": {"decode": 5}, "kv_bytes_decoding": 1000}))  # type: ignore[arg-type]
    least = floor(run, Workload(3, 10, 6), MODEL, FULL, Limits(bandwidth, 1e6), 2)
    weights = 2 * (4 * 2 * (4 + 2) + 3 * 4 * 8) + 10 * 4
    step = (weights * 2 + 1000) / bandwidth if bound == "memory" else 2 * weights * 3 / 1e6
    assert least.decode_step == pytest.approx(step)
    assert least.prefill == pytest.approx(3 * prefill_flops(FULL, MODEL) / 1e6)
    assert least.whole == pytest.approx(least.prefill + 5 * step)
