"""What `bench policies` measures, and that nothing is measured twice."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.bench_policies import KV_KEEPS
from cluster.commands.policy_table import table
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.cell import BASELINE, Cell, all_cells, chosen
from workers.bench.results import Results, Row, compared
from workers.bench.settings import DECODE, PREFILL, CompareSettings
from workers.policies.registry import BUILT_IN, versions

SETTINGS = CompareSettings("toy", "float32", "cpu", 1, (10, 20), 4, 1, 1, 30, ("W1",))
VERSIONS = versions()
EVICT = Cell(Compression("pyramid", "evict", 0.45))


def row(cell: Cell, loss: float = 2.0, gains: tuple[float, ...] = (2.0, 0.1, 4.0), error: str = "") -> Row:
    numbers = {"kept_10": 0.5, "loss_10": loss, "kept_20": 0.45, "loss_20": 2 * loss}
    numbers |= {f"W1_{PREFILL}": 1.5, f"W1_{DECODE}": 100.0}
    policy = cell.compression.policy
    measured = Row(cell.name, policy, VERSIONS[policy], numbers, gains, 3.0)
    return dataclasses.replace(measured, numbers={}, gains=(), error=error) if error else measured


def written(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_every_policy_has_a_cell_for_each_way_and_share_and_the_baseline_is_first() -> None:
    cells = all_cells(KV_KEEPS)
    assert cells[0] == BASELINE
    expected = sum(1 if each.keeps_all else 2 * max(1, len(each.prefills)) for each in BUILT_IN)
    assert len({cell.name for cell in cells}) == len(cells) == expected
    assert {cell.compression.policy for cell in cells} == {policy.name for policy in BUILT_IN}
    assert EVICT in cells
    assert EVICT.name == "pyramid/evict@0.45"


def test_the_usual_cells_are_as_few_as_the_help_says() -> None:
    assert len(all_cells(KV_KEEPS)) <= 24


def test_a_share_that_is_given_twice_is_measured_once() -> None:
    assert all_cells([0.3, 0.3]) == all_cells([0.3])


def test_a_share_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"kv_keep is 1\.5; it must be in \(0, 1\]"):
        all_cells([1.5])


def test_chosen_cells_come_with_the_baseline_and_unknown_ones_are_refused() -> None:
    cells = all_cells([0.45])
    assert chosen(cells, [EVICT.name]) == [BASELINE, EVICT]
    assert chosen(cells, []) == cells
    with pytest.raises(InvalidRequestError, match=r"'pyramid@0.45'; there are full, .*pyramid/evict@0.45"):
        chosen(cells, ["pyramid@0.45"])


def test_losses_and_facts_are_compared_where_the_document_helps() -> None:
    told = compared(row(EVICT, 2.2, (1.0, -5.0, 2.0)), row(BASELINE))
    assert told["worse_10"] == pytest.approx(0.1)
    assert told["worse_20"] == pytest.approx(0.1)
    assert told["facts_kept"] == pytest.approx(0.5)
    assert told["facts_low"] <= told["facts_kept"] <= told["facts_high"]
    helpless = compared(row(EVICT, gains=(1.0,)), row(BASELINE, gains=(0.1,)))
    assert set(helpless) == {"worse_10", "worse_20"}
    assert compared(row(EVICT), None) == compared(row(EVICT), row(BASELINE, error="no")) == {}
    assert compared(row(EVICT, error="no"), row(BASELINE)) == {}


def test_a_file_holds_what_is_measured_as_soon_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    results = Results(SETTINGS, VERSIONS, file)
    assert written(file) == []
    results.add(row(BASELINE))
    assert [line["cell"] for line in written(file)] == ["full"]
    results.add(row(EVICT, 2.2))
    line = written(file)[1]
    assert float(line["worse_20"]) == pytest.approx(0.1)
    assert float(line["facts_kept"]) == 1
    assert line["W1_prefill_seconds"] == "1.5"
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_there_is_not_missing_and_what_failed_is(tmp_path: Path) -> None:
    file, cells = tmp_path / "out.csv", all_cells([0.45])
    results = Results(SETTINGS, VERSIONS, file)
    for each in (row(BASELINE), row(EVICT, error="ValueError: no, it\ncannot")):
        results.add(each)
    again = Results(SETTINGS, VERSIONS, file)
    assert again.rows == results.rows
    assert again.missing(cells) == cells[1:]
    again.add(row(EVICT))
    assert EVICT not in again.missing(cells)
    assert [line["error"] for line in written(file)] == ["", ""]


def test_a_baseline_that_comes_late_is_compared_with_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    results = Results(SETTINGS, VERSIONS, file)
    results.add(row(EVICT))
    assert written(file)[0]["worse_10"] == ""
    results.add(row(BASELINE))
    assert written(file)[0]["worse_10"] == "0"


def test_a_file_of_other_settings_or_versions_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    Results(SETTINGS, VERSIONS, file).add(row(EVICT))
    before = file.read_text()
    others = dataclasses.replace(SETTINGS, prompts=(10, 40), threads=2)
    with pytest.raises(
        InvalidRequestError,
        match=r"out.csv was measured with threads 1, here 2, prompts 10 20, here 10 40;",
    ):
        Results(others, VERSIONS, file)
    with pytest.raises(InvalidRequestError, match=r"policy 'pyramid' in version .*, here it is 99"):
        Results(SETTINGS, {**VERSIONS, "pyramid": "99"}, file)
    assert file.read_text() == before


@pytest.mark.parametrize("content", ["some text", "cell,policy,version,error\nfull,full,1,\n", "\0"])
def test_a_file_of_something_else_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    file.write_text(content)
    with pytest.raises(InvalidRequestError, match=r"out.csv is none that `bench policies` wrote"):
        Results(SETTINGS, VERSIONS, file)
    assert file.read_text() == content


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"out.csv cannot be written: .*; give another file"):
        Results(SETTINGS, VERSIONS, tmp_path / "nowhere" / "out.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "--threads is 0; it must be 1 or more"),
        ({"goes_on": 0}, "--goes-on is 0; it must be 1 or more"),
        ({"talks": -1}, "--talks is -1; it must be 0 or more"),
        ({"prompts": (0, 5)}, "--prompts has 0; they must be 1 or more"),
        ({"workloads": ("W9",)}, "workload 'W9' is neither"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_a_context_that_is_too_short_is_refused_by_what_is_too_long() -> None:
    alone = dataclasses.replace(SETTINGS, workloads=())
    alone.check_context(1054)
    with pytest.raises(InvalidRequestError, match=r"--document 30 with questions take up to 1054"):
        alone.check_context(1053)
    with pytest.raises(InvalidRequestError, match=r"--prompts 20 and --goes-on 4 .* toy is 23: give less"):
        alone.check_context(23)
    with pytest.raises(InvalidRequestError, match=r"--workloads W3 take up to 4224"):
        dataclasses.replace(alone, workloads=("W3",)).check_context(4223)


def test_the_table_has_a_line_a_cell_and_errors_in_words() -> None:
    rows = [row(BASELINE), row(EVICT, 2.2), row(Cell(Compression("local", "", 0.45)), error="A|B: c")]
    lines = table(rows, rows[0], SETTINGS).splitlines()
    assert lines[2] == "| full | 0.450 | 2.000 | 4.000 | 100% (100% to 100%) | 1.50 | 100.0 |"
    assert lines[3].startswith("| pyramid/evict@0.45 | 0.450 | 2.200 (+10.00%) | 4.400 (+10.00%) |")
    assert lines[4] == "| local@0.45 | A/B: c |"
    assert {line.count("|") for line in lines[:4]} == {8}
