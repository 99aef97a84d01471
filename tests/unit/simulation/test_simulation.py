"""Whole clusters that are simulated, and what is said of them."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest

from cluster.load.report import Objective
from cluster.load.trace import Session, Turn, arrivals, draw_sessions
from cluster.simulation.report import summarise
from cluster.simulation.run import Simulated, Simulation
from cluster.simulation.setup import USUAL, Scaling, Setup, gpu_setup
from cluster.simulation.turn import SimulatedTurn
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression

FULL, PRUNE = Compression("full"), Compression("pyramid", "prune", kv_keep=0.45)
OBJECTIVE = Objective(5.0, 0.1)


def chat(rate: float, seconds: float, seed: int = 1) -> Iterator[tuple[float, Session]]:
    return zip(
        arrivals("poisson", rate, seconds, seed), itertools.cycle(draw_sessions(50, seed)), strict=False
    )


def cluster(compression: Compression = PRUNE, pipelines: int = 1, scaling: Scaling | None = None) -> Setup:
    setup = gpu_setup("7b", 1, compression, USUAL, pipelines, scaling)
    return dataclasses.replace(setup, pool_bytes=setup.pool_bytes // 8)


def test_the_same_seed_is_the_same_run() -> None:
    told = [summarise(Simulation(cluster()).run_chat(chat(2, 60), 60), OBJECTIVE, 10) for _ in range(2)]
    for each in told:
        del each["decisions_per_second"]
    assert told[0] == told[1]
    assert told[0]["turns_done"] > 50
    assert told[0]["within_objective"]


def test_compressed_a_pool_serves_more() -> None:
    served = {
        compression.policy: summarise(
            Simulation(cluster(compression)).run_chat(chat(8, 90), 90), OBJECTIVE, 30
        )
        for compression in (FULL, PRUNE)
    }
    assert all(each["memory_filled"] > 0.8 for each in served.values())
    assert served["pyramid"]["requests_per_second"] > 1.6 * served["full"]["requests_per_second"]
    assert served["pyramid"]["turns_refused"] <= served["full"]["turns_refused"]


def test_pipelines_come_under_load_and_go_after_it() -> None:
    scaling = Scaling(most=3, start_seconds=5.0, down_seconds=10.0)
    busy = chat(8, 60)
    run = Simulation(cluster(scaling=scaling)).run_chat(busy, 200)
    counts = {round(each.moment): each.pipelines for each in run.samples}
    assert counts[0] == counts[6] == 1
    assert max(counts.values()) == 3
    assert counts[199] == 1
    assert sum(run.turns.refused) == 0
    told = summarise(run, OBJECTIVE, 0)
    assert told["turns_done"] == told["turns_due"] > 300


def test_a_full_queue_refuses() -> None:
    setup = dataclasses.replace(cluster(), queue_limit=2)
    run = Simulation(setup).run_chat(chat(20, 30), 30)
    told = summarise(run, OBJECTIVE, 0)
    assert told["turns_refused"] > 0
    assert max(each.queued for each in run.samples) <= 2


def test_thinking_takes_its_time() -> None:
    session = Session((Turn(100, 10, 7.0), Turn(20, 10, 1.0)))
    run = Simulation(cluster()).run_chat([(1.0, session)], 30)
    first, second = zip(run.turns.arrived, run.turns.ended, strict=True)
    assert first[0] == pytest.approx(1.0)
    assert second[0] == pytest.approx(first[1] + 7.0)


def test_what_has_not_begun_has_waited_until_the_end() -> None:
    run = Simulated(seconds=100.0)
    for arrived, first in ((10.0, 11.0), (20.0, float("nan"))):
        turn = SimulatedTurn(None, 10, arrived, first_token=first)  # type: ignore[arg-type]
        run.turns.add(turn)
    run.samples = Simulation(cluster()).run_chat([], 3).samples
    run.router_seconds = 1.0
    told = summarise(run, OBJECTIVE, 0)
    assert (told["ttft_p50"], told["ttft_p99"]) == (1.0, 80.0)
    assert told["turns_done"] == 0
    assert not told["within_objective"]


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"1 GPUs of 80 GB cannot hold the 138 GB of 70b"):
        gpu_setup("70b", 1, FULL, USUAL, 1, None)
