"""`pyramidserve calibrate` on a toy: what it measures, and that policies find what it has written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pyramidserve.cli import main
from pyramidserve.types import Compression, TokenLogprob
from workers.bench.layers import divergence
from workers.model.config import read_config
from workers.policies import registry
from workers.policies.budget import read_calibration
from workers.policies.registry import plan, settled, use_budgets

SIZES = ("--prompt", "90", "--goes-on", "6", "--texts", "2", "--threads", "1", "--dtype", "float32")


def test_a_model_is_measured_and_its_budgets_are_used(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CALIBRATIONS", {})
    model, out = toy("gqa"), tmp_path / "budgets.json"
    assert main(["calibrate", str(model), *SIZES, "--kv-keep", "0.7", "0.5", "--out", str(out)]) == 0
    written, facts = read_calibration(out), read_config(model)
    assert written.kept == (0.5, 0.7)
    assert written.model == facts.fingerprint
    for weights in written.weights:
        assert len(weights) == facts.layers
        assert sum(weights) / facts.layers == pytest.approx(1, abs=1e-3)
    assert len(set(written.weights[0])) > 1
    use_budgets(str(out))
    told = settled(Compression("defensive", kv_keep=0.5), facts.fingerprint)
    kept = plan(told, 300, facts.layers).kept
    assert len(set(kept)) > 1
    assert sum(kept) == 150 * facts.layers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-keep", "1.0"], "--kv-keep is 1.0"),
        (["--texts", "0"], "--texts is 0"),
        (["--texts", "100000"], "the standard library here has"),
        (["--prompt", "100000"], "the context of"),
        (["--out", "nowhere/budgets.json"], "--out is nowhere/budgets.json"),
    ],
)
def test_bad_options_are_refused(
    options: list[str],
    says: str,
    tmp_path: Path,
    toy: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ("--out", str(tmp_path / "budgets.json"))
    assert main(["calibrate", str(toy("gqa")), *SIZES, *out, *options]) == 1
    assert says in capsys.readouterr().err


def test_the_divergence_is_nothing_between_equals_and_something_between_others() -> None:
    one = TokenLogprob(-0.5, (1, 2), (-0.5, -1.5))
    assert divergence(one, one) == pytest.approx(0)
    assert divergence(one, TokenLogprob(-0.5, (2, 1), (-0.5, -1.5))) > 0.1


def test_the_embedded_models_budgets_come_with_this(embedded: Path) -> None:
    facts = read_config(embedded)
    told = settled(Compression("defensive", kv_keep=0.25), facts.fingerprint)
    kept = plan(told, 1024, facts.layers).kept
    assert len(set(kept)) > 1
    assert sum(kept) == 256 * facts.layers
