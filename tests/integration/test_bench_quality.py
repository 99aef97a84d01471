"""`pyramidserve bench quality`, on a toy: what is measured, left out the second time, and may fail."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from policy_package import installed_policies

from pyramidserve.cli import main
from pyramidserve.errors import UnavailableError
from workers.bench import quality
from workers.bench.problems import Problem
from workers.bench.tasks import KINDS

SIZES = (
    *("--prompts", "60", "300", "--goes-on", "8", "--texts", "2", "--talks", "1", "--document", "200"),
    *("--task-prompts", "1200", "--tasks", "1", "--workloads", "2x64+8", "--threads", "1"),
)
PROBLEM = Problem("Toy/0", "def double(n):", "double", "", "\n    return 2 * n\n")
# Made of a policy that is known, so that it plans; but for long prompts.
STUMBLES = """
from dataclasses import replace
from workers.policies.local import POLICY as KNOWN, plan_local

def plan(target, knobs):
    if target.prompt_tokens > 100:
        raise ValueError("it stumbles")
    return plan_local(target, knobs)

POLICY = replace(KNOWN, name="stumbles", plan=plan)
"""


@pytest.fixture
def stumbles(tmp_path: Path) -> Iterator[None]:
    with installed_policies(tmp_path, "stumbling", STUMBLES, {"stumbles": "POLICY"}):
        yield


@pytest.fixture(autouse=True)
def problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is no download."""
    monkeypatch.setattr(quality, "fetch", lambda: Path("wheel"))
    monkeypatch.setattr(quality, "read", lambda _: [PROBLEM])


def compare(model: Path, *options: str, dtype: str = "float32") -> int:
    return main(["bench", "quality", "--model", str(model), *SIZES, "--dtype", dtype, *options])


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "quality.csv").open(newline="") as text:
        return {line["cell"]: line for line in csv.DictReader(text)}


@pytest.mark.usefixtures("stumbles")
def test_cells_are_measured_once_part_by_part_and_one_that_raises_stops_no_other(
    tmp_path: Path, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # In float32 a token takes twice the bytes of 16 bits: three tenths of the tokens are 0.6.
    cells = ["stumbles@0.6", "pyramid/evict+turn@0.6"]
    options = ["--policies", "stumbles", "--out", str(out)]
    assert compare(toy("long"), *options, "--cells", *cells) == 1
    said = capsys.readouterr()
    told = rows(out)
    assert list(told) == ["full", "stumbles@0.6", "pyramid/evict+turn@0.6"]
    assert told["stumbles@0.6"]["error"] == "ValueError: it stumbles"
    assert "2 of 3, stumbles@0.6: ValueError: it stumbles after" in said.err
    assert "about 0 minutes are left" in said.err
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    full, evict = told["full"], told["pyramid/evict+turn@0.6"]
    for line in (full, evict):
        names = ("loss_60", "loss_300", "agree_300", "loss_humaneval")
        assert all(0 < float(line[name]) < math.inf for name in names)
    assert [float(full[name]) for name in ("worse_300", "worst_300", "agree_300")] == [0, 0, 1]
    assert float(evict["kept_300"]) == pytest.approx(0.3, abs=0.02)
    assert float(evict["bytes_300"]) == pytest.approx(0.6, abs=0.04)
    ratio = float(evict["loss_300"]) / float(full["loss_300"])
    assert float(evict["worse_300"]) == pytest.approx(ratio - 1, abs=1e-5)
    assert float(evict["worse_300_low"]) <= ratio - 1 + 1e-5
    assert "| pyramid/evict+turn@0.6 | 0.6" in said.out
    found = json.loads((out / "quality.json").read_text())["cells"]["pyramid/evict+turn@0.6"]["parts"]
    assert {name.split()[0] for name in found["tasks"]["unseen"]["gains"]} == set(KINDS)
    assert len(found["facts"]["gains"]) == len(found["instructions"]["gains"]) == 4
    assert len(found["instructions"]["asked"]) == 1

    measured = (out / "quality.json").read_text()
    assert compare(toy("long"), *options, "--cells", cells[1]) == 0
    again = capsys.readouterr()
    assert "out has 2 of 2 cells already: full, pyramid/evict+turn@0.6" in again.err
    assert "measuring" not in again.err
    assert again.out == said.out
    assert (out / "quality.json").read_text() == measured

    # Another part is measured beside what is there.
    assert compare(toy("long"), *options, "--cells", "full", "--parts", "loss", "speed") == 0
    assert float(rows(out)["full"]["2x64+8_decode_tokens_per_second"]) > 0
    assert rows(out)["full"]["loss_300"] == full["loss_300"]

    assert compare(toy("long"), *options, "--texts", "1") == 1
    assert "quality.json was measured with texts 2, here 1; give another folder" in capsys.readouterr().err


def test_auto_is_a_cell_and_reads_as_what_it_stands_for(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    cells = "auto:int8@0.25", "defensive:int8@0.25", "auto:int8@0.7", "full:int8"
    options = ["--out", str(tmp_path), "--parts", "loss", "--cells", *cells]
    assert compare(toy("long"), *options) == 0
    some, named, all_tokens, full = (
        rows(tmp_path)[name]
        for name in ("auto:int8@0.25", "defensive/evict:int8@0.25", "auto:int8@0.7", "full:int8")
    )
    for name in ("kept_300", "bytes_300", "loss_300", "agree_300"):
        assert some[name] == named[name]
        assert all_tokens[name] == full[name]
    assert float(some["bytes_300"]) == pytest.approx(0.25, abs=0.01)


def test_a_cell_that_keeps_all_gains_what_full_does_whether_its_question_is_seen_or_not(
    tmp_path: Path, toy: Callable[[str], Path]
) -> None:
    cells = ["--cells", "snapkv@2", "pyramid/evict@2"]
    assert compare(toy("long"), "--parts", "loss", "tasks", *cells, "--out", str(tmp_path)) == 0
    told = json.loads((tmp_path / "quality.json").read_text())["cells"]
    gains = told["full"]["parts"]["tasks"]["seen"]["gains"]
    assert any(gains.values())
    for row in told.values():
        assert row["parts"]["tasks"]["seen"]["gains"] == pytest.approx(gains, abs=1e-3)
        assert row["parts"]["tasks"]["unseen"]["gains"] == pytest.approx(gains, abs=1e-3)
    assert told["snapkv@2"]["parts"]["loss"]["300"]["agree"] == [1, 1]


def test_a_budget_ends_between_cells_and_the_same_command_goes_on(
    tmp_path: Path, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--parts", "loss", "--cells", "local@0.6", "streaming@0.6", "--out", str(tmp_path)]
    assert compare(toy("long"), *options, "--budget", "1e-9") == 0
    assert "--budget 1e-09 is used up: 2 cells are left for another time" in capsys.readouterr().err
    assert list(rows(tmp_path)) == ["full"]
    assert compare(toy("long"), *options) == 0
    assert list(rows(tmp_path)) == ["full", "local@0.6", "streaming@0.6"]


def test_what_cannot_be_had_is_left_out_by_name(
    toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Path:
        raise UnavailableError("no network")

    monkeypatch.setattr(quality, "fetch", refuse)
    assert compare(toy("long"), "--parts", "loss", "humaneval", "--cells", "full") == 0
    said = capsys.readouterr()
    assert "humaneval is left out: no network" in said.err
    assert "HumanEval" not in said.out
    assert compare(toy("long"), "--parts", "humaneval", "--cells", "full") == 0
    assert "measuring 0 cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cells", "nobody@0.3"], "unknown policy 'nobody'; known are full, "),
        (["--cells", "local@"], "--cells names 'local@'; it must be POLICY/PREFILL[KNOB=VALUE,...]:FORMAT"),
        (["--cells", "local@2.1"], "local@2.1: all tokens take 2 of the bytes in that format; give less"),
        (["--cells", "local@0"], "kv_keep is 0.0; it must be in (0, 1]"),
        (["--policies", "nobody"], "--policies names 'nobody', which is not installed"),
        (["--prompts", "5000"], "--prompts 5000 and --goes-on 8 take up to 5008 tokens; the context of"),
        (["--texts", "99999"], "--texts is 99999; what every Python brings along has"),
        (["--talks", "9999", "--document", "900"], "--talks is 9999; what every Python brings along has"),
        (["--document", "9"], "a document of 9 tokens has 2 words; 12 facts need more: give more tokens"),
        (["--task-prompts", "90"], "--task-prompts has 90; the least of niah_single takes"),
        (["--workloads", "1x4096+8"], "--workloads 1x4096+8 take up to 4104 tokens; the context of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    options: list[str], message: str, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(toy("long"), *options, "--parts", *quality.PARTS) == 1
    assert message in capsys.readouterr().err
