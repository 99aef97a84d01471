"""`pyramidserve calibrate` on a toy: what it measures, and that policies find what it has written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pyramidserve.cli import main
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Stopping, TokenLogprob
from workers.bench.layers import divergence
from workers.bench.repeated import LEAST, Training, least_squares
from workers.bench.texts import others, windows
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model.config import read_config
from workers.model.llama import LlamaLayer
from workers.model.tokenizer import Tokenizer
from workers.policies import measured, registry
from workers.policies.auto import CANDIDATES
from workers.policies.budget import Calibration, read_calibration
from workers.policies.gates import Gates, read_gates
from workers.policies.kvzap import SINKS
from workers.policies.measured import use_budgets
from workers.policies.registry import plan
from workers.policies.settled import candidates, settled

SIZES = ("--prompt", "90", "--goes-on", "6", "--texts", "2", "--threads", "1", "--dtype", "float32")


def test_a_model_is_measured_and_its_budgets_are_used(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "CALIBRATIONS", {})
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
    monkeypatch.setattr(measured, "CALIBRATIONS", {})
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
        (share, each.policy, each.prefill, each.parameters)
        for share in (0.5, 0.75)
        for each in candidates(facts)
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
    trials = measured.CALIBRATIONS[facts.fingerprint].trials
    assert len(trials) == 4 * len(candidates(facts))
    for kv_dtype in ("bfloat16", "int8", "int4"):
        told = settled(Compression("auto", kv_bytes_keep=0.25), facts, kv_dtype, 4000)
        assert told.policy in {each.policy for each in CANDIDATES}


def trained(model: Path, out: Path, *options: str) -> Gates:
    assert main(["calibrate", str(model), *SIZES, "--gate-texts", "3", "--gates", str(out), *options]) == 0
    return read_gates(out)


def test_gates_are_trained_alike_each_time_and_a_policy_chooses_by_them(
    tmp_path: Path, toy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "GATES", {})
    model, first, second = toy("gqa"), tmp_path / "first", tmp_path / "second"
    facts, gates = read_config(model), trained(model, first)
    np.testing.assert_allclose(trained(model, second).weights, gates.weights, rtol=1e-3, atol=1e-4)
    assert "repeated" not in registry.POLICIES
    measured.GATES.clear()
    assert gates.model == facts.fingerprint
    assert gates.weights.shape[:2] == (facts.layers, facts.kv_heads)
    asked = EngineRequest(
        range(3, 103), stopping=Stopping(4, ignore_eos=True), compression=Compression("kvzap", kv_keep=0.4)
    )
    config = EngineConfig(checkpoint=str(model), dtype="float32", kv_bytes=8 << 20, host_bytes=8 << 20)
    with pytest.raises(InvalidRequestError, match="needs gates"):
        Engine(config).generate([asked])
    (reply,) = Engine(replace(config, gates=str(first))).generate([asked])
    assert reply.receipt.kv_keep_reached == pytest.approx(0.4, abs=0.01)


def test_gates_are_fitted_to_the_attention_that_a_repetition_pays(toy: Callable[[str], Path]) -> None:
    """Times what the value adds to the output; told by plain attention over all of the rows."""
    text = [*range(3, 43)]
    seen: dict[LlamaLayer, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    model = str(toy("gqa"))
    engine = Engine(
        EngineConfig(
            checkpoint=model, dtype="float32", backend="reference", kv_bytes=8 << 20, host_bytes=8 << 20
        )
    )
    training = Training(engine)
    project = LlamaLayer.project

    def watch(layer: LlamaLayer, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        query, kv = project(layer, *arguments)  # type: ignore[arg-type]
        seen.setdefault(layer, []).append((query, kv.clone()))
        return query, kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaLayer, "project", watch)
        training.read([text], lambda _: None)
    for products, (layer, read) in zip(training.products, seen.items(), strict=True):
        (_, first), (query, rest) = read
        kv = torch.cat((first, rest))
        heads, kv_heads = query.shape[1], kv.shape[2]
        keys, values = kv.repeat_interleave(heads // kv_heads, dim=2).unbind(1)
        logits = torch.einsum("rhd,thd->hrt", query, keys) * query.shape[2] ** -0.5
        later = torch.arange(len(kv)) > torch.arange(len(first), len(kv))[:, None]
        paid = logits.masked_fill(later, -torch.inf).softmax(dim=-1).amax(dim=1)[:, SINKS : len(text)]
        lengths = torch.einsum("ohd,thd->hto", layer.output_weight, values[SINKS : len(text)])
        adds = lengths.square().sum(dim=2).view(kv_heads, heads // kv_heads, -1).mean(dim=1).sqrt()
        most = paid.view(kv_heads, heads // kv_heads, -1).amax(dim=1)
        # The last feature is 1, so that its product with what is wanted is the sum of that.
        wanted = (most * adds + LEAST).log().sum(dim=1)
        torch.testing.assert_close(products[:, -2, -1].float(), wanted, rtol=1e-3, atol=1e-2)


def test_least_squares_find_what_is_linear() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 400, 6, generator=draw, dtype=torch.float64) * torch.tensor([1, 9, 0.1, 3, 1, 1])
    rows[..., -1] = 1
    weights = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    both = torch.cat((rows, rows @ weights[..., None]), dim=-1)
    torch.testing.assert_close(least_squares(both.mT @ both), weights, rtol=0.05, atol=0.05)


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
        (["--gates", "nowhere/gates"], "--gates is nowhere/gates"),
        (["--gates", "gates", "--gate-texts", "0"], "--gate-texts is 0"),
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


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("gqa", [], "neither --out nor --gates was given"),
        ("gqa", ["--gate-texts", "100000"], "--gate-texts is 100000; the standard library here has"),
        ("gqa", ["--prompt", "120"], "--prompt and --goes-on, or what repeats it, are"),
        ("mistral-window", [], "layers of"),
    ],
)
def test_gates_that_cannot_be_trained_are_refused(
    kind: str,
    options: list[str],
    says: str,
    tmp_path: Path,
    toy: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = () if "neither" in says else ("--gates", str(tmp_path / "gates"))
    assert main(["calibrate", str(toy(kind)), *SIZES, *out, *options]) == 1
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


def test_the_embedded_models_gates_come_with_this(embedded: Path) -> None:
    facts = read_config(embedded)
    assert measured.GATES[facts.fingerprint].weights.shape[:2] == (facts.layers, facts.kv_heads)
    settled(Compression("kvzap", kv_keep=0.25), facts, "bfloat16", 1024)
