"""Shares of bytes and ``auto``: what shards are told in their place, and what is refused."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.budget.kv_format import KV_FORMATS
from workers.budget.kv_share import KVShare
from workers.model.shapes import SHAPES
from workers.policies import measured
from workers.policies import settled as settling
from workers.policies.auto import CANDIDATES, UNMEASURED, choose_policy
from workers.policies.budget import Calibration, Trial
from workers.policies.registry import offered, plan, policy_name, versions
from workers.policies.settled import alike, settled
from workers.policies.valid import validate

MODEL = replace(SHAPES["llama-2-7b"], layers=3)
TRIALS = (
    Trial(0.1, "snapkv", "", (), 0.9, 0.3),
    Trial(0.1, "defensive", "evict", (), 0.8, 0.3),
    Trial(0.4, "snapkv", "", (), 0.9, 0.5),
    Trial(0.4, "expected_attention", "", (("layer_budget", "calibrated"),), 0.8, 0.8),
    Trial(0.4, "defensive", "prune", (), 0.9, 0.9),
    Trial(0.8, "pyramid", "evict", (), 0.95, None),
    Trial(0.8, "of another package", "", (), 1.0, 1.0),
)


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(MODEL.fingerprint, (0.5,), ((0.5, 1.5, 1.0),), TRIALS)
    monkeypatch.setattr(measured, "CALIBRATIONS", {MODEL.fingerprint: calibration})


def told(compression: Compression, kv_dtype: str = "bfloat16", prompt_tokens: int = 1000) -> Compression:
    """What shards are told; router and head settle it alike, and once is enough."""
    validate(compression)
    found = settled(compression, MODEL, kv_dtype, prompt_tokens)
    assert settled(found, MODEL, kv_dtype, prompt_tokens) == found
    return found


@pytest.mark.parametrize("kv_dtype", KV_FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("prompt_tokens", [300, 1000, 4000])
def test_a_plan_takes_the_bytes_that_were_asked_for_and_not_a_token_more(
    kv_dtype: str, share: float, prompt_tokens: int
) -> None:
    kv = KVShare.of(KV_FORMATS[kv_dtype], MODEL.head_size)
    for recall in ("off", "step"):
        found = told(Compression("snapkv", "", None, recall, kv_bytes_keep=share), kv_dtype, prompt_tokens)
        kept, *others = plan(found, prompt_tokens, 3).kept
        assert set(others) == {kept}
        indexes = found.recall == "step" and found.policy != "full"
        least = found.kv_keep is not None and found.kv_keep <= 0.126
        if least or found.policy == "full":
            continue
        assert kv.in_bytes(kept / prompt_tokens, prompt_tokens, indexes) <= share + 1e-9
        assert kv.in_bytes((kept + 1) / prompt_tokens, prompt_tokens, indexes) > share - 1e-9


def test_all_stay_where_all_take_fewer_bytes_than_were_asked_for() -> None:
    asked = Compression("snapkv", recall="turn", parameters={"heads": "all"}, kv_bytes_keep=0.6)
    assert told(asked, "int8") == Compression("full", recall="turn", kv_bytes_keep=0.6)
    assert told(asked, "bfloat16") == replace(asked, kv_keep=0.6)
    assert told(asked, "float32") == replace(asked, kv_keep=0.3)
    assert told(replace(asked, kv_bytes_keep=1.0)).policy == "full"


def test_a_share_with_no_room_for_a_token_keeps_one() -> None:
    found = told(Compression("snapkv", kv_bytes_keep=0.25), "int4", 40)
    assert plan(found, 40, 3).kept == (1, 1, 1)
    step = told(Compression("snapkv", recall="step", kv_bytes_keep=0.01))
    validate(replace(step, kv_bytes_keep=None))
    assert plan(step, 1000, 3).fraction == pytest.approx(0.125, abs=1e-3)


def test_weights_are_those_of_the_tokens_that_stay(budgets: None) -> None:
    by_bytes = told(Compression("defensive", kv_bytes_keep=0.25), "float32")
    assert by_bytes.parameters == told(Compression("defensive", kv_keep=0.125)).parameters != ()


def test_auto_is_what_was_measured_best_where_about_as_much_stays(budgets: None) -> None:
    def name(share: float, kv_dtype: str = "bfloat16", **fields: str) -> str:
        return policy_name(told(Compression("auto", **fields, kv_bytes_keep=share), kv_dtype))  # type: ignore[arg-type]

    assert name(0.05) == name(0.1) == name(0.199) == "snapkv"
    assert name(0.201) == name(0.4) == name(0.56) == "expected_attention"
    assert name(0.57) == name(0.8) == name(0.99) == "pyramid/evict"
    assert name(1.0) == "full"
    # In half of the bytes twice as many tokens stay, and so on.
    assert name(0.25, "int8") == "expected_attention"
    assert name(0.25, "int4") == "pyramid/evict"
    assert name(0.3, "int4") == "full"
    assert name(0.05, prefill="prune") == "defensive/prune"
    assert name(0.4, prefill="evict") == "expected_attention"


def test_auto_brings_its_knobs_and_leaves_what_was_asked_for(budgets: None) -> None:
    found = told(Compression("auto", recall="turn", kv_bytes_keep=0.25), "int8")
    assert (found.recall, found.kv_bytes_keep) == ("turn", 0.25)
    assert found.kv_keep == pytest.approx(0.25 / KV_FORMATS["int8"].share(MODEL.head_size))
    weights = dict(found.parameters)["layer_budget"]
    assert isinstance(weights, tuple)
    assert len(weights) == 3
    assert told(Compression("auto", kv_keep=0.4)).policy == "expected_attention"
    assert told(Compression("auto", kv_keep=1.0)) == Compression("full")


def test_of_a_model_that_nobody_measured_it_is_the_usual_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settling._tell_unmeasured.cache_clear()
    with caplog.at_level(logging.INFO):
        found = [told(Compression("auto", kv_bytes_keep=share)) for share in (0.2, 0.3)]
    assert [policy_name(each) for each in found] == ["defensive/evict"] * 2
    (record,) = caplog.records
    assert record.getMessage().startswith("policies_not_measured model='3 layers, ")
    assert record.getMessage().endswith("auto='defensive/evict'")
    assert policy_name(told(Compression("auto", "prune", kv_bytes_keep=0.3))) == "defensive/prune"


def test_a_model_with_windows_has_one_choice_for_all_heads(budgets: None) -> None:
    windows = replace(MODEL, windows=(64, 0, 64))
    for prefill, heads in (("", "mean"), ("prune", "mean")):
        asked = Compression("auto", prefill, kv_bytes_keep=0.4)
        assert plan(settled(asked, windows, "bfloat16", 500), 500, 3).heads == heads
    assert plan(told(Compression("auto", kv_bytes_keep=0.4)), 500, 3).heads == "each"


@pytest.mark.parametrize(
    ("compression", "says"),
    [
        (Compression("snapkv", kv_bytes_keep=0.0), "kv_bytes_keep is 0.0; it must be in (0, 1]"),
        (Compression("snapkv", kv_bytes_keep=1.5), "kv_bytes_keep is 1.5"),
        (Compression("snapkv", kv_bytes_keep=float("nan")), "kv_bytes_keep is nan"),
        (
            Compression("snapkv", kv_keep=0.4, kv_bytes_keep=0.3),
            "kv_keep 0.4 was given beside kv_bytes_keep 0.3; give one of them alone",
        ),
        (
            Compression("snapkv", parameters={"tokens": 5}, kv_bytes_keep=0.3),
            "kv_bytes_keep 0.3 was given beside tokens 5",
        ),
        (
            Compression("tova", parameters={"cache_size": 5}, kv_bytes_keep=0.3),
            "kv_bytes_keep 0.3 was given beside cache_size",
        ),
        (Compression("full", kv_bytes_keep=0.3), "kv_bytes_keep 0.3 was given, but policy 'full' keeps"),
        (Compression("auto"), "policy 'auto' was given neither kv_bytes_keep nor kv_keep"),
        (Compression("auto", "skip", kv_keep=0.3), "prefill is 'skip'; it must be 'evict' or 'prune'"),
        (Compression("auto", kv_keep=0.3, parameters={"heads": "all"}), "'heads' is no knob"),
        (Compression("auto", parameters={"tokens": 5}), "tokens is 5, but policy 'auto' chooses that"),
        (
            Compression("auto", kv_keep=0.3, parameters={"layer_budget": "uniform"}),
            "layer_budget is 'uniform', but policy 'auto' chooses that itself",
        ),
        (Compression("auto", "prune", 0.3, "step"), "recall 'step' needs all KV"),
        (Compression("auto", recall="later", kv_keep=0.3), "recall is 'later'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(compression: Compression, says: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(compression)
    assert says in refused.value.message


def test_auto_is_offered_and_has_no_version() -> None:
    assert "auto" in offered()
    assert "auto" not in versions()


def test_a_share_of_bytes_may_come_to_other_tokens_in_the_next_turn(budgets: None) -> None:
    asked = Compression("defensive", kv_bytes_keep=0.2)
    first, next_turn = (told(asked, "int4", tokens) for tokens in (300, 500))
    assert first != next_turn
    assert alike(first, next_turn)
    others = [replace(asked, kv_bytes_keep=0.21), replace(asked, recall="turn"), Compression("snapkv")]
    assert not any(alike(first, other) for other in others)
    assert alike(Compression("snapkv", kv_keep=0.4), Compression("snapkv", kv_keep=0.4))
    assert not alike(Compression("snapkv", kv_keep=0.4), Compression("snapkv", kv_keep=0.5))


@pytest.mark.parametrize("trials", [(), TRIALS])
def test_whatever_was_measured_there_is_a_choice(trials: Sequence[Trial]) -> None:
    for kv_keep in (0.01, 0.3, 1.0):
        for prefill in ("", "evict", "prune"):
            found = choose_policy(trials[:-1], kv_keep, prefill)
            validate(replace(found, kv_keep=kv_keep))
            assert (found.prefill == "prune") == (prefill == "prune")


def test_candidates_can_be_asked_for_at_any_share() -> None:
    assert UNMEASURED in CANDIDATES
    for candidate in CANDIDATES:
        validate(replace(candidate, kv_keep=0.01))
        validate(replace(candidate, kv_bytes_keep=1.0))
