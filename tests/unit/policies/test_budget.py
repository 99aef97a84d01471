"""How layers share a budget: all of it, within bounds, and as was measured where that is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression
from workers.model.config import ModelConfig
from workers.model.shapes import SHAPES
from workers.policies import measured
from workers.policies.budget import Calibration, Trial, best_shares, read_calibration, shared_out
from workers.policies.measured import use_budgets
from workers.policies.registry import plan
from workers.policies.settled import settled
from workers.policies.valid import validate

TRIAL = {"kept": 0.5, "policy": "tova", "prefill": "", "parameters": {}, "text": 0.5, "facts": 0.5}
ONE = {"model": "m", "kept": [0.5], "weights": [[1]]}
THREE_LAYERS = replace(SHAPES["llama-2-7b"], layers=3)

weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=12)


@given(weights, st.integers(1, 500), st.floats(0, 1))
def test_all_is_shared_out_within_bounds_and_by_weight(own: list[float], most: int, share: float) -> None:
    tokens = len(own) + int(share * len(own) * (most - 1))
    counts = shared_out(tokens, own, most)
    assert sum(counts) == tokens
    assert all(1 <= count <= most for count in counts)
    free = [(count, weight) for count, weight in zip(counts, own, strict=True) if 1 < count < most]
    for count, weight in free:
        for other, others in free:
            assert abs(count / weight - other / others) <= 1 / weight + 1 / others


@st.composite
def curves(draw: st.DrawFn) -> list[dict[float, float]]:
    """Losses that fall the more slowly the more is kept, to nothing."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        steps = sorted(draw(st.lists(st.floats(0, 9), min_size=4, max_size=4)))
        shares = (1.0, 0.8, 0.6, 0.4, 0.2)
        made.append(dict(zip(shares, (sum(steps[:n]) for n in range(5)), strict=True)))
    return made


@given(curves(), st.integers(1, 5))
def test_the_best_shares_lose_no_more_than_even_ones_of_the_same_mean(
    losses: list[dict[float, float]], fifths: int
) -> None:
    kept = round(fifths / 5, 1)
    shares = best_shares(losses, kept)
    assert sum(shares) / len(shares) == pytest.approx(kept)
    assert all(0.2 <= share <= 1 + 1e-9 for share in shares)

    def lost(curve: dict[float, float], share: float) -> float:
        low = max(point for point in curve if point <= share + 1e-9)
        high = min(point for point in curve if point >= share - 1e-9)
        part = (share - low) / (high - low) if high > low else 0
        return curve[low] + part * (curve[high] - curve[low])

    best = sum(map(lost, losses, shares))
    assert best <= sum(curve[kept] for curve in losses) + 1e-6


def test_a_layer_that_loses_nothing_gives_its_share_away() -> None:
    careless, careful = {0.1: 0.0, 0.5: 0.0, 1.0: 0.0}, {0.1: 4.0, 0.5: 1.0, 1.0: 0.0}
    assert best_shares([careless, careful], 0.3) == pytest.approx((0.1, 0.5))


def test_budgets_between_those_that_were_measured_are_in_between() -> None:
    known = Calibration("m", (0.2, 0.4), ((1.5, 0.5), (1.25, 0.75)))
    assert known.at(0.1) == (1.5, 0.5)
    assert known.at(0.3) == pytest.approx((1.375, 0.625))
    assert known.at(0.4) == (1.25, 0.75)
    assert known.at(0.7) == pytest.approx((1.125, 0.875))
    assert known.at(1) == (1, 1)


def test_what_was_tried_is_read_as_it_was_written(tmp_path: Path) -> None:
    knobs = (("heads", "all"), ("layer_budget", (1.0, 2.0)))
    trials = Trial(0.5, "tova", "", (), 0.5, None), Trial(0.5, "pyramid", "evict", knobs, 0.5, 0.25)
    written = Calibration("m", (0.5,), ((0.5, 1.5),), trials)
    written.write(tmp_path / "budgets.json")
    read = read_calibration(tmp_path / "budgets.json")
    assert read == written
    assert [each.score for each in read.trials] == [0.5, 0.375]


@pytest.fixture
def budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for models of three layers; what is taken in is forgotten again."""
    monkeypatch.setattr(measured, "CALIBRATIONS", dict(measured.CALIBRATIONS))
    file = tmp_path / "budgets.json"
    Calibration(THREE_LAYERS.fingerprint, (0.5,), ((0.5, 1.5, 1.0),)).write(file)
    return file


def test_weights_go_with_a_request_to_a_model_that_was_measured(budgets: Path) -> None:
    def told(asked: Compression, model: ModelConfig = THREE_LAYERS) -> Compression:
        return settled(asked, model, "bfloat16", 200)

    asked = Compression("defensive", kv_keep=0.5)
    assert told(asked) == asked
    assert plan(asked, 200, 3).kept == (100, 100, 100)
    use_budgets("")
    use_budgets(str(budgets))
    assert plan(told(asked), 200, 3).kept == (50, 150, 100)
    assert told(told(asked)) == told(asked)
    assert told(asked, replace(THREE_LAYERS, layers=4)) == asked
    others = [Compression("snapkv", kv_keep=0.5), Compression("defensive"), Compression()]
    assert list(map(told, others)) == others
    asked = Compression("snapkv", kv_keep=0.5, parameters={"layer_budget": "calibrated"})
    assert plan(told(asked), 200, 3).kept == (50, 150, 100)


@pytest.mark.parametrize("policy", ["defensive", "snapkv", "h2o"])
def test_a_request_says_how_layers_share(policy: str) -> None:
    def kept(budget: object) -> tuple[int, ...]:
        compression = Compression(policy, kv_keep=0.4, parameters={"layer_budget": budget})  # type: ignore[dict-item]
        validate(compression)
        return plan(compression, 1000, 3).kept

    assert kept("uniform") == (400, 400, 400)
    assert kept("pyramid") == (600, 400, 200)
    assert kept([1, 1, 2]) == (300, 300, 600)
    assert kept([1, 1, 100]) == (100, 100, 1000)
    with pytest.raises(InvalidRequestError, match="layer_budget has 2 weights for the 3 layers"):
        kept([1, 2])


@pytest.mark.parametrize(
    ("compression", "says"),
    [
        (Compression("h2o", kv_keep=0.4, parameters={"layer_budget": "best"}), "layer_budget is 'best'"),
        (Compression("h2o", kv_keep=0.4, parameters={"layer_budget": 3}), "layer_budget is 3"),
        (Compression("h2o", kv_keep=0.4, parameters={"layer_budget": [1, 0]}), "weights from 1e-6 to 1e6"),
        (Compression("h2o", parameters={"layer_budget": "uniform"}), "there is no kv_keep"),
        (Compression("pyramid", "prune", 0.4, parameters={"layer_budget": "uniform"}), "shape of its own"),
        (Compression("full", parameters={"layer_budget": "uniform"}), "there is no kv_keep"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(compression: Compression, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        validate(compression)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"model": "m", "kept": [0.5], "weights": []}),
        json.dumps({"model": "m", "kept": [0.5], "weights": [[1, 0]]}),
        json.dumps({"model": "m", "kept": [0.5, 0.2], "weights": [[1], [1]]}),
        json.dumps({"model": "m", "kept": [0.5, 0.7], "weights": [[1], [1, 1]]}),
        json.dumps({"model": "m", "kept": [0.5], "weights": [["much"]]}),
        json.dumps({**ONE, "trials": [{"kept": 0.5}]}),
        json.dumps({**ONE, "trials": [{**TRIAL, "kept": 2}]}),
        json.dumps({**ONE, "trials": [{**TRIAL, "text": math.nan}]}),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "budgets.json"
    with pytest.raises(ConfigurationError, match=r"budgets.json' cannot be read.*pyramidserve calibrate"):
        read_calibration(file)
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"budgets.json' cannot be read.*pyramidserve calibrate"):
        read_calibration(file)
