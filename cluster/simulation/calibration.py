"""What `bench engine` has measured, and the costs that explain it."""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.simulation.run import Simulation
from cluster.simulation.setup import Setup
from cluster.simulation.timing import Costs
from cluster.simulation.turn import simulated_turn
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.workload import Workload
from workers.model.config import ModelConfig
from workers.model.work import Limits, prefill_flops, weights_read
from workers.policies.registry import plan

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Measured:
    """A workload that one shard has run; times in seconds, memory in bytes.

    Attributes:
        rows, kv_bytes: of a decode step, on average.
        step_seconds: of a decode step with all that happens between two.
    """

    name: str
    model: ModelConfig
    limits: Limits
    itemsize: int
    kv_dtype: str
    workload: Workload
    compression: Compression
    pool_bytes: int
    rows: float
    kv_bytes: float
    step_seconds: float
    prefill_seconds: float
    wall_seconds: float


def read_measured(file: Path) -> Measured:
    """What `bench engine --json` has written. Raises InvalidRequestError if it is something else."""
    try:
        told: dict[str, Any] = json.loads(file.read_text())
        named = dict(told["workload"])
        name, workload = named.pop("name"), Workload(**named)
        steps = median(run["turns"]["decode"] for run in told["runs"])
        if told["shards"] != 1 or not steps or workload.output < 2:
            raise InvalidRequestError(
                f"{str(file)!r} was measured with {told['shards']} shards and {steps} decode steps; "
                "measure with --shards 1 and outputs of several tokens"
            )
        wall, prefill = told["wall_seconds"], told["prefill_seconds"]
        return Measured(
            name=name,
            model=ModelConfig(**{name: _hashable(value) for name, value in told["model"].items()}),
            limits=Limits(**told["machine"]),
            itemsize=ITEMSIZE[told["dtype"]],
            kv_dtype=told.get("kv_dtype", told["dtype"]),
            workload=workload,
            compression=Compression(
                **{key: told["compression"][key] for key in ("policy", "prefill", "kv_keep")}
            ),
            pool_bytes=told["pool_bytes"],
            rows=workload.requests * (workload.output - 1) / steps,
            kv_bytes=told["kv_bytes_decoding"],
            step_seconds=(wall - prefill) / steps,
            prefill_seconds=prefill,
            wall_seconds=wall,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(
            f"{str(file)!r} is not what `bench engine --json` writes: {error!r}"
        ) from error


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def machine(measured: list[Measured]) -> Limits:
    """The limits that were seen, at the median."""
    return Limits(
        median(each.limits.read_bytes_per_second for each in measured),
        median(each.limits.flops_per_second for each in measured),
    )


def fit(measured: list[Measured]) -> Costs:
    """The costs, none below zero, with the least squares of the relative errors."""
    limits = machine(measured)
    parts, steps = [], []
    for each in measured:
        weights = weights_read(each.model)
        least = (
            weights * each.itemsize / limits.read_bytes_per_second,
            each.kv_bytes / limits.read_bytes_per_second,
            2 * weights * each.rows / limits.flops_per_second,
        )
        parts.append([part / each.step_seconds for part in least])
        steps.append(1.0)
    weights_cost, kv, rows = _least_squares(np.array(parts), np.array(steps))
    return Costs(
        weights_cost, kv, rows, median(each.prefill_seconds / _prefill(each, limits) for each in measured)
    )


def predict(each: Measured, costs: Costs, limits: Limits) -> float:
    """Seconds that the simulation takes for the workload of ``each``."""
    workload = each.workload
    setup = Setup(
        *(each.model, each.itemsize, 1, limits, costs, each.pool_bytes, each.compression),
        kv_dtype=each.kv_dtype,
    )
    sizes = workload.prompt, workload.output, workload.output
    turns = [simulated_turn(*sizes, each.compression, "", 0.0) for _ in range(workload.requests)]
    return Simulation(setup).run_batch(turns).seconds


def _prefill(each: Measured, limits: Limits) -> float:
    """Seconds of the workload's prompts at the machine's best."""
    keep = plan(each.compression, each.workload.prompt, each.model.layers)
    return each.workload.requests * prefill_flops(keep, each.model) / limits.flops_per_second


def _least_squares(
    parts: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """The ``x >= 0`` with the least ``|parts x - whole|``: tries every set of columns above zero."""
    best, least = np.zeros(3), float(whole @ whole)
    for count in (1, 2, 3):
        for columns in combinations(range(3), count):
            chosen = list(columns)
            found = np.linalg.lstsq(parts[:, chosen], whole, rcond=None)[0]
            error = float(((parts[:, chosen] @ found - whole) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[chosen] = found
    return float(best[0]), float(best[1]), float(best[2])
