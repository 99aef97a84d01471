"""`pyramidserve calibrate` on a toy: what it measures, and that policies find what it has written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pyramidserve.cli import main
from pyramidserve.types import Compression, TokenLogprob
from workers.bench.layers import divergence
from workers.bench.texts import others, windows
from workers.model.config import read_config
from workers.model.tokenizer import Tokenizer
from workers.policies import registry
from workers.policies.auto import CANDIDATES
from workers.policies.budget import Calibration, read_calibration
from workers.policies.registry import plan, settled, use_budgets

SIZES = ("--prompt", "90", "--goes-on", "6", "--texts", "2", "--threads", "1", "--dtype", "float32")


def test_a_model_is_measured_and_its_budgets_are_used(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CALIBRATIONS", {})
    model, out = toy("gqa"), tmp_path / "budgets.json"
    command = ["calibrate", str(model), *SIZES, "--parts", "budgets", "--out", str(out)]
    assert main([*command, "--kv-keep", "0.7", "0.5"]) == 0
    written, facts = read_calibration(out), read_config(model)
    assert written.trials == ()
    assert written.kept == (0.5, 0.7)
    assert written.model == facts.fingerprint
    for weights in written.weights:
        assert len(weights) == facts.layers
        assert sum(weights) / facts.layers == pytest.approx(1, abs=1e-3)
    assert len(set(written.weights[0])) > 1
    use_budgets(str(out))
    told = settled(Compression("defensive", kv_keep=0.5), facts, "float32", 300)
    kept = plan(told, 300, facts.layers).kept
    assert len(set(kept)) > 1
    assert sum(kept) == 150 * facts.layers


def test_policies_are_tried_with_the_budgets_that_are_there_and_auto_takes_the_best(
    tmp_path: Path,
    toy: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(registry, "CALIBRATIONS", {})
    model, out = toy("long"), tmp_path / "budgets.json"
    facts = read_config(model)
    Calibration(facts.fingerprint, (0.5,), ((1.5, 1.5, 1.5, 0.5, 0.5, 0.5),)).write(out)
    command = ["calibrate", str(model), *SIZES, "--kv-keep", "0.5", "--talks", "2", "--out", str(out)]
    assert main([*command, "--parts", "policies"]) == 0
    written = read_calibration(out)
    assert written.weights == ((1.5, 1.5, 1.5, 0.5, 0.5, 0.5),)
    trials = written.trials
    tried = [(each.kept, each.policy, each.prefill, each.parameters) for each in trials]
    assert tried == [
        (share, each.policy, each.prefill, each.parameters) for share in (0.5, 0.75) for each in CANDIDATES
    ]
    assert len({each.text for each in trials}) > 1
    use_budgets(str(out))
    at_half = [each for each in trials if each.kept == 0.5 and each.prefill != "prune"]
    best = max(at_half, key=lambda each: each.score)
    chosen = settled(Compression("auto", kv_bytes_keep=0.6), facts, "bfloat16", 300)
    assert (chosen.policy, chosen.prefill, chosen.kv_keep) == (best.policy, best.prefill, 0.6)
    assert f"{out} has the policies of models with 6 layers" in capsys.readouterr().err


def test_budgets_of_another_model_are_refused(
    tmp_path: Path, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "budgets.json"
    Calibration("another", (0.5,), ((1.0,),)).write(out)
    assert main(["calibrate", str(toy("long")), *SIZES, "--parts", "policies", "--out", str(out)]) == 1
    assert "has the budgets of models with another" in capsys.readouterr().err


def test_what_is_read_to_calibrate_is_in_nothing_that_is_compared_with(embedded: Path) -> None:
    tokenizer = Tokenizer(embedded)
    compared = tokenizer.decode([token for each in windows(tokenizer, 1152, 126) for token in each])
    for text in others(tokenizer, 1152, 20):
        for first in range(0, 1152, 64):
            assert tokenizer.decode(text[first : first + 64]) not in compared


def test_auto_has_measured_the_embedded_model(embedded: Path) -> None:
    facts = read_config(embedded)
    trials = registry.CALIBRATIONS[facts.fingerprint].trials
    assert len(trials) == 4 * len(CANDIDATES)
    for kv_dtype in ("bfloat16", "int8", "int4"):
        told = settled(Compression("auto", kv_bytes_keep=0.25), facts, kv_dtype, 4000)
        assert told.policy in {each.policy for each in CANDIDATES}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-keep", "1.0"], "--kv-keep is 1.0"),
        (["--texts", "0"], "--texts is 0"),
        (["--texts", "100000"], "the standard library here has"),
        (["--prompt", "100000"], "the context of"),
        (["--parts", "budgets", "policies"], "give less, or --parts budgets"),
        (["--parts", "policies"], "budgets.json' cannot be read"),
        (["--talks", "0"], "--talks is 0"),
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
    parts = ("--parts", "budgets")
    assert main(["calibrate", str(toy("gqa")), *SIZES, *parts, *out, *options]) == 1
    assert says in capsys.readouterr().err


def test_the_divergence_is_nothing_between_equals_and_something_between_others() -> None:
    one = TokenLogprob(-0.5, (1, 2), (-0.5, -1.5))
    assert divergence(one, one) == pytest.approx(0)
    assert divergence(one, TokenLogprob(-0.5, (2, 1), (-0.5, -1.5))) > 0.1


def test_the_embedded_models_budgets_come_with_this(embedded: Path) -> None:
    facts = read_config(embedded)
    told = settled(Compression("defensive", kv_keep=0.25), facts, "bfloat16", 1024)
    kept = plan(told, 1024, facts.layers).kept
    assert len(set(kept)) > 1
    assert sum(kept) == 256 * facts.layers
