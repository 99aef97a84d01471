"""Shares of bytes in an engine: what the receipt says of them is what the pool held, and sessions go on."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pyramidserve.cli import main
from pyramidserve.types import Compression, Receipt, Stopping
from workers.budget.kv_format import KV_FORMATS
from workers.engine.engine import Engine, EngineRequest
from workers.policies import measured
from workers.policies.budget import Calibration, Trial

KIND, PROMPT = "wide-heads", 150


def ask(
    engine: Engine, compression: Compression, ids: list[int], tokens: int = 1, session: str = ""
) -> tuple[tuple[int, ...], Receipt]:
    request = EngineRequest(
        ids, stopping=Stopping(tokens, ignore_eos=True), compression=compression, session_id=session
    )
    (reply,) = engine.generate([request])
    engine.check_integrity()
    return reply.token_ids, reply.receipt


def some(count: int) -> list[int]:
    draw = random.Random(count)
    return [draw.randrange(3, 259) for _ in range(count)]


@pytest.mark.parametrize("recall", ["off", "step"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_the_receipt_says_what_the_pool_held(
    kv_dtype: str, recall: str, toy_engine: Callable[..., Engine]
) -> None:
    engine = toy_engine(KIND, dtype="float32", kv_dtype=kv_dtype)
    model, form = engine.model, KV_FORMATS[kv_dtype]
    whole = PROMPT * model.layers * KV_FORMATS["bfloat16"].row_bytes(model.kv_heads, model.head_size)
    page = form.page_bytes(model.kv_heads, model.head_size)
    # Of each layer: its tokens, its index with what scales that, and its ring are whole pages.
    rounding = (1 + 2 * (recall == "step") + bool(form.recent)) * page * model.layers
    for share in (0.25, 0.33, 0.43):
        receipt = ask(engine, Compression("snapkv", "", None, recall, kv_bytes_keep=share), some(PROMPT))[1]
        reached = receipt.kv_bytes_keep_reached
        assert reached * whole - 1 <= receipt.peak_device_bytes.kv <= reached * whole + rounding
        assert receipt.kv_bytes_keep_target == share
        assert receipt.policy == "snapkv"
        assert receipt.kv_keep_target is not None
        # Fewer bytes than asked for by less than a token a layer, but for the least that there can be.
        least = recall == "step" and receipt.kv_keep_target < 0.126
        assert share - form.share(model.head_size) / PROMPT < reached <= share + 1e-9 or least
    full = ask(engine, Compression(), some(PROMPT))[1]
    assert (full.kv_keep_reached, full.kv_bytes_keep_target) == (1, None)
    ring = 48 * KV_FORMATS["int8"].share(model.head_size) / PROMPT if form.recent else 0
    assert full.kv_bytes_keep_reached == pytest.approx(form.share(model.head_size) + ring)


@pytest.mark.parametrize(
    ("kv_dtype", "share", "policy"),
    [
        *(("int8", 0.2, "snapkv"), ("int8", 0.45, "expected_attention"), ("int8", 0.6, "full")),
        *(("int4", 0.25, "snapkv"), ("int4", 0.35, "expected_attention"), ("int4", 0.6, "full")),
    ],
)
def test_auto_runs_what_was_measured_and_the_receipt_names_it(
    kv_dtype: str,
    share: float,
    policy: str,
    toy_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = toy_engine(KIND, kv_dtype=kv_dtype)
    trials = (Trial(0.3, "snapkv", "", (), 0.9, 0.9), Trial(0.6, "expected_attention", "", (), 0.9, None))
    known = Calibration(engine.model.fingerprint, (0.5,), ((1.0,) * engine.model.layers,), trials)
    monkeypatch.setattr(measured, "CALIBRATIONS", {known.model: known})
    asked = Compression("auto", recall="turn", kv_bytes_keep=share)
    ids, receipt = ask(engine, asked, some(PROMPT), 9)
    assert receipt.policy == policy
    assert receipt.recall == ("off" if policy == "full" else "turn")
    kept = receipt.kv_keep_target
    by_name = Compression() if policy == "full" else Compression(policy, "", kept, "turn")
    again, named = ask(engine, by_name, some(PROMPT), 9)
    assert ids == again
    assert named.kv_keep_reached == receipt.kv_keep_reached
    assert receipt.kv_bytes_keep_reached <= share
    assert receipt.kv_bytes_keep_reached == named.kv_bytes_keep_reached


@pytest.mark.parametrize("recall", ["off", "turn", "step", "exact"])
@pytest.mark.parametrize("policy", ["pyramid", "streaming", "defensive"])
def test_turns_of_a_session_go_on_though_each_keeps_another_share_of_its_tokens(
    policy: str, recall: str, toy_engine: Callable[..., Engine]
) -> None:
    engine = toy_engine(KIND, kv_dtype="int4")
    prefill = "evict" if policy != "streaming" else ""
    asked = Compression(policy, prefill, None, recall, kv_bytes_keep=0.35)
    ids, left, targets = some(60), 0, set()
    for more in (20, 30, 40):
        output, receipt = ask(engine, asked, ids, 12, "s")
        assert receipt.reused_tokens == left
        targets.add(receipt.kv_keep_target)
        left, ids = len(ids) + 11, [*ids, *output, *some(more)]
    assert len(targets) > 1
    engine.end_session("s")
    for stage in engine.stages:
        assert stage.cache.device.pool.allocator.pages_in_use == stage.cache.host.bytes_in_use == 0


def test_trace_takes_a_share_of_bytes(
    tmp_path: Path, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("word " * 40)
    command = ["trace", "--model", str(toy(KIND)), "--text", str(tmp_path / "text"), "--kv-dtype", "int8"]
    options = ["--policy", "auto", "--kv-bytes-keep", "0.25", "--kv-bytes", str(8 << 20)]
    assert main([*command, *options]) == 0
    told = capsys.readouterr().out
    assert "defensive/evict: " in told
    assert "of 0.471 asked for (0.25 of the bytes) kept, in 0.2" in told


def test_trace_takes_in_gates_and_budgets_of_the_model(
    tmp_path: Path,
    toy: Callable[[str], Path],
    toy_gates: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured, "GATES", {})
    (tmp_path / "text").write_text("word " * 40)
    command = ["trace", "--model", str(toy(KIND)), "--text", str(tmp_path / "text"), "--policy", "kvzap"]
    options = ["--kv-keep", "0.5", "--kv-bytes", str(8 << 20)]
    assert main([*command, *options]) == 1
    assert "calibrate DIR --gates FILE" in capsys.readouterr().err
    assert main([*command, *options, "--gates", str(toy_gates(KIND))]) == 0
    assert "kvzap: " in capsys.readouterr().out
    assert main([*command, *options, "--budgets", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
