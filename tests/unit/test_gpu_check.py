"""The check of a card: what one section loses is lost to it alone, and the table says what there is."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import check
from bench.gpu.check import SECTIONS, describe, is_wrong, main
from bench.gpu.context import Context, OutOfTimeError
from bench.gpu.kernels import kernels
from bench.gpu.load import Load, whole
from bench.gpu.report import NOTHING, table
from workers.backends.reference import ReferenceBackend

CPU = torch.device("cpu")


def context(out: Path, seconds: float = math.inf) -> Context:
    return Context(CPU, True, time.monotonic() + seconds, out)


def fails(own: Context, results: dict[str, Any]) -> None:
    results["before"] = 1
    raise ValueError("a kernel broke")


def runs_out(own: Context, results: dict[str, Any]) -> None:
    own.ends = time.monotonic()
    results["before"] = 2
    own.check_time()


def finds_fault(own: Context, results: dict[str, Any]) -> None:
    results["ok"] = False


class Rounding(ReferenceBackend):
    """Kernels whose logits pass through bfloat16."""

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().logits(x, weight).bfloat16().float()


def test_a_section_that_fails_or_runs_out_of_time_leaves_what_it_had(tmp_path: Path) -> None:
    own = context(tmp_path / "folder" / "out.json")
    for name, section in (("fails", fails), ("finds", finds_fault), ("late", runs_out), ("never", fails)):
        own.run(name, section)
        written = json.loads(own.out.read_text())
        assert written == own.results
    assert own.results["fails"]["before"] == 1
    assert own.results["fails"]["error"] == "ValueError: a kernel broke"
    assert "fails" in own.results["fails"]["traceback"][-2] or own.results["fails"]["traceback"]
    assert own.results["late"] | {"seconds": 0} == {
        "before": 2,
        "cut_short": "the time was up",
        "seconds": 0,
    }
    assert "before" not in own.results["never"]
    assert [is_wrong(found) for found in own.results.values()] == [True, True, False, False]
    assert describe(own.results["never"]) == "skipped, as the time was up"
    with pytest.raises(OutOfTimeError):
        own.check_time()


def test_a_kernel_that_rounds_too_much_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    kernels(context(tmp_path / "out.json"), found)
    assert found["ok"]
    monkeypatch.setattr("bench.gpu.kernels.choose_backend", lambda *_: Rounding(torch.float32))
    monkeypatch.setattr("bench.gpu.kernels.TOLERANCES", {torch.float32: 3e-5})
    broken: dict[str, Any] = {}
    kernels(context(tmp_path / "out.json"), broken)
    assert not broken["ok"]
    errors = broken["float32"]["errors"]
    assert errors["logits"] > 1e-4 > errors["linear"]


def test_a_device_that_is_not_there_ends_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "tpu"]) == 1
    assert "device is 'tpu', which torch does not know" in capsys.readouterr().out


def test_a_check_exits_with_1_where_a_section_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "SECTIONS", {"card": lambda own, found: None, "tokens": finds_fault})
    out = tmp_path / "out.json"
    assert main(["--device", "cpu", "--tiny", "--out", str(out)]) == 1
    assert "tokens: WRONG in" in capsys.readouterr().out
    assert json.loads(out.read_text())["tokens"]["ok"] is False


def test_what_the_whole_of_an_output_takes_follows_from_its_ends() -> None:
    load = Load(512, 256, 32)
    assert load.ends == ((512, 256), (704, 64))
    ends = [
        {"first_tokens_s": 2.0, "step_ms": 10.0, "kv_gb": 1.0},
        {"first_tokens_s": 3.0, "step_ms": 30.0, "kv_gb": 2.0},
    ]
    found = whole(load, 32, ends)
    assert found["tokens_s"] == pytest.approx(32 * 256 / (2 + 255 * 0.02), rel=1e-3)
    assert found["kv_gb"] == 2


def test_the_table_says_what_there_is_and_what_is_missing() -> None:
    assert list(table([])) == [NOTHING]
    ends = [{"step_ms": 10.0, "roofline": 0.5}, {"step_ms": 12.0, "roofline": 0.4}]
    run = {"batch": 32, "kv_gb": 20.1, "tokens_s": 2000.0, "ends": ends}
    one = {
        "date": "2026-11-27",
        "card": {"machine": {"name": "A Card"}, "versions": {"torch": "2.11.0"}},
        "kernels": {"error": "ValueError: no"},
        "13b": {
            "model": "random:llama-2-13b",
            "512+256": {"batch 32": {"full": [run, run | {"tokens_s": 1900.0}], "prune": []}},
            "cut_short": "the time was up",
        },
    }
    lines = list(table([one]))
    assert lines[2] == (
        "| A Card, torch 2.11.0 | llama-2-13b | 512+256 | full, batch 32 | 32 | 20.10 | 10.0 to 12.0 "
        "| 50% to 40% | 2000 and 1900 |"
    )
    assert len(lines) == 5
    for said in ("card as it should be", "kernels went wrong (ValueError: no)", "13b is not whole"):
        assert said in lines[-1]
    assert all(name in lines[-1] for name in SECTIONS)
