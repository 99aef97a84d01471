"""`pyramidserve bench policies`, on a toy: what is measured, left out the second time, and may fail."""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from policy_package import installed_policies

from pyramidserve.cli import main

SIZES = (
    *("--prompts", "60", "300", "--goes-on", "8", "--texts", "1", "--talks", "1", "--document", "200"),
    *("--workloads", "2x64+8", "--threads", "1", "--dtype", "float32"),
)
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


def compare(model: Path, *options: str) -> int:
    return main(["bench", "policies", "--model", str(model), *SIZES, *options])


@pytest.mark.usefixtures("stumbles")
def test_policies_are_compared_once_and_one_that_raises_stops_no_other(
    tmp_path: Path, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "out.csv", tmp_path / "out.png"
    cells = ["stumbles@0.3", "pyramid/evict@0.3"]
    options = ["--policies", "stumbles", "--kv-keep", "0.3", "--csv", str(out), "--plot", str(plot)]
    assert compare(toy("long"), *options, "--cells", *cells) == 1
    said = capsys.readouterr()
    with out.open(newline="") as text:
        told = {line["cell"]: line for line in csv.DictReader(text)}
    assert list(told) == ["full", "pyramid/evict@0.3", "stumbles@0.3"]
    assert told["stumbles@0.3"]["error"] == "ValueError: it stumbles"
    assert plot.read_bytes().startswith(b"\x89PNG")
    for line in (told["full"], told["pyramid/evict@0.3"]):
        names = ["loss_60", "loss_300", "2x64+8_prefill_seconds", "2x64+8_decode_tokens_per_second"]
        numbers = [float(line[name]) for name in names]
        assert all(0 < number < math.inf for number in numbers)
        assert len(line["answer_gains"].split()) == 4
    assert float(told["full"]["worse_300"]) == 0
    evict = told["pyramid/evict@0.3"]
    assert float(evict["worse_300"]) == pytest.approx(
        float(evict["loss_300"]) / float(told["full"]["loss_300"]) - 1, abs=1e-5
    )
    assert float(evict["kept_300"]) == pytest.approx(0.3, abs=0.02)
    assert "3 of 3, stumbles@0.3: ValueError: it stumbles after" in said.err
    assert "0 minutes are left" in said.err
    assert "| pyramid/evict@0.3 | 0.3" in said.out

    measured = out.read_text()
    assert compare(toy("long"), *options, "--cells", cells[1]) == 0
    again = capsys.readouterr()
    assert "out.csv has 2 of 2 cells already: full, pyramid/evict@0.3" in again.err
    assert "measuring" not in again.err
    assert again.out == said.out
    assert out.read_text() == measured

    assert compare(toy("long"), *options, "--texts", "2") == 1
    assert "out.csv was measured with texts 1, here 2; give another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cells", "nobody"], "--cells names 'nobody'; there are full, "),
        (["--policies", "nobody"], "--policies names 'nobody', which is not installed"),
        (["--kv-keep", "0"], "kv_keep is 0.0; it must be in (0, 1]"),
        (["--plot", "picture.bmp"], "--plot is picture.bmp; its folder must be there, and its name end in"),
        (["--prompts", "5000"], "--prompts 5000 and --goes-on 8 take up to 5008 tokens; the context of"),
        (["--texts", "99999"], "--texts is 99999; the reference of Python has"),
        (["--talks", "9999", "--document", "900"], "--talks is 9999; the reference of Python has"),
        (["--document", "9"], "a document of 9 tokens has 2 words; 12 facts need more: give more tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    options: list[str], message: str, toy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(toy("long"), *options) == 1
    assert message in capsys.readouterr().err
