"""What `bench quality` compares and sums up, and that nothing is measured twice."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.quality_table import table
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.cell import BASELINE, SHARES, Cell, Holding, read_cell, usual, with_baseline
from workers.bench.intervals import mean_share, share
from workers.bench.parts.passages import passages_record
from workers.bench.results import Results, Row
from workers.bench.settings import DECODE, PREFILL, QualitySettings
from workers.bench.summary import summary
from workers.budget.kv_format import KV_FORMATS
from workers.budget.kv_share import KVShare
from workers.policies.registry import versions

SETTINGS = QualitySettings("toy", "bfloat16", "cpu", 1, (10, 20), 4, 1, 1, 30, (40,), 1, ("W1",))
VERSIONS = versions()
EVICT = read_cell("pyramid/evict:int8+turn@0.25")


@dataclasses.dataclass(frozen=True)
class Read:
    log_probabilities: Sequence[float]
    likeliest: Sequence[int]
    kept: float = 0.5


def row(cell: Cell) -> Row:
    policy = cell.compression.policy
    return Row(cell.method, policy, VERSIONS[policy], 1.0)


def loss(*nats: float, agree: float = 1.0) -> dict[str, Any]:
    tokens = [4] * len(nats)
    return {"10": {"kept": 0.5, "tokens": tokens, "nats": list(nats), "agree": [agree] * len(nats)}}


def gains(**kinds: list[float]) -> dict[str, Any]:
    named = {f"{kind} 40 {i}": gain for kind, own in kinds.items() for i, gain in enumerate(own)}
    return {"unseen": {"kept": 0.5, "gains": named}}


def written(folder: Path) -> list[dict[str, str]]:
    with (folder / "quality.csv").open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize(
    "name",
    [
        *("full", "full:int4", "snapkv@0.45", "pyramid/evict:int8+turn@0.25", "pyramid/prune@0.12"),
        "snapkv[heads=all,window_size=200]:int8@0.25",
    ],
)
def test_a_cell_has_the_name_that_it_is_read_from(name: str) -> None:
    assert read_cell(name).name == name


def test_the_usual_prefill_and_no_format_need_not_be_named() -> None:
    assert read_cell("pyramid:auto+off@0.450") == read_cell("pyramid@0.45")
    assert read_cell("pyramid@0.45").name == "pyramid/prune@0.45"
    assert read_cell("snapkv[window_size=200]@0.5").compression == Compression(
        "snapkv", parameters={"window_size": 200}
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "--cells names ''; it must be POLICY/PREFILL"),
        ("local", "--cells names 'local'; 'local' does not keep all: give it a share, as in @0.25"),
        ("full@0.5", "--cells names 'full@0.5'; 'full' keeps all: leave its share out"),
        ("local:int5@0.5", "--cells names 'local:int5@0.5'; its format must be one of auto, float32"),
        ("local[window]@0.5", "'window' must be KNOB=VALUE"),
        ("pyramid/prune+step@0.5", "recall 'step' needs all KV"),
    ],
)
def test_a_name_that_is_no_cell_is_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_cell(name)
    assert message in str(refused.value)


def test_a_share_of_bytes_is_one_of_tokens_by_what_a_token_takes() -> None:
    int8, int4 = (KVShare.of(KV_FORMATS[name], 64) for name in ("int8", "int4"))
    assert Holding(read_cell("local@0.25"), KVShare(1.0)).asks(1000).kv_keep == 0.25
    assert Holding(read_cell("local:int8@0.25"), int8).asks(1000).kv_keep == pytest.approx(0.25 / 0.515625)
    assert Holding(read_cell("full:int8"), int8).asks(1000) == Compression()
    with pytest.raises(InvalidRequestError, match=r"local:int4@0.45: all tokens take 0.266 of the bytes"):
        Holding(read_cell("local:int4@0.45"), int4).asks(1000)


def test_auto_keeps_all_where_there_are_bytes_for_it() -> None:
    int4 = KVShare.of(KV_FORMATS["int4"], 64)
    cell = read_cell("auto:int4@0.3")
    assert cell.name == "auto:int4@0.3"
    assert Holding(cell, int4).asks(4000) == Compression("auto", kv_keep=1.0)
    fewer = Holding(read_cell("auto:int4+turn@0.2"), int4).asks(10**6)
    assert (fewer.policy, fewer.recall) == ("auto", "turn")
    assert fewer.kv_keep == pytest.approx(0.2 / 0.265625, abs=1e-4)


@pytest.mark.parametrize("name", ["float32", "int8", "int4"])
def test_the_bytes_of_a_cell_with_an_index_are_those_of_its_share(name: str) -> None:
    cell, shares = read_cell(f"snapkv:{name}+step@0.26"), KVShare.of(KV_FORMATS[name], 64)
    kept = Holding(cell, shares).asks(4000).kv_keep
    assert kept is not None
    assert kept * shares.token + Holding(cell, shares).fixed(4000) == pytest.approx(0.26)


def test_what_is_taken_in_any_case_is_not_there_for_tokens() -> None:
    holding = Holding(read_cell("local:int4@0.25"), KVShare.of(KV_FORMATS["int4"], 64))
    assert holding.fixed(990) == 0.025
    assert holding.asks(990).kv_keep == pytest.approx((0.25 - 0.025) / 0.265625)
    assert holding.asks(50).kv_keep == 1 / 50  # one that stays in any case


def test_the_usual_cells_are_at_most_forty_and_can_all_be_on_the_embedded_model() -> None:
    cells = with_baseline(usual())
    assert cells[0] == BASELINE
    assert len({cell.name for cell in cells}) == len(cells) <= 40
    for cell in cells:
        form = KV_FORMATS["bfloat16" if cell.kv_dtype == "auto" else cell.kv_dtype]
        Holding(cell, KVShare.of(form, 64)).asks(1024)
    assert {cell.share for cell in cells} == {None, *SHARES}
    assert with_baseline([EVICT, BASELINE, EVICT]) == [BASELINE, EVICT]


def test_a_share_of_sums_lies_within_its_interval() -> None:
    found = share([(1.0, 1.0), (0.5, 1.0), (1.5, 2.0)] * 20)
    assert found.value == pytest.approx(0.75)
    assert found.low < found.value < found.high
    assert share([(1.0, 1.0)] * 9) == (1.0, 1.0, 1.0)
    assert found == share([(1.0, 1.0), (0.5, 1.0), (1.5, 2.0)] * 20)


def test_groups_count_alike_however_large_their_sums_are() -> None:
    found = mean_share([[(100.0, 100.0)], [(0.0, 1.0), (0.0, 1.0)]])
    assert found.value == pytest.approx(0.5)
    assert mean_share([[(1.0, 2.0), (3.0, 2.0)]]) == share([(1.0, 2.0), (3.0, 2.0)])


def test_what_is_chosen_is_compared_with_the_full_cache_token_by_token() -> None:
    full = passages_record([Read([-1.0, -2.0], [3, 4])], None)
    assert full["likeliest"] == ["3 4"]
    own = passages_record([Read([-1.5, -2.0], [3, 5], 0.25)], full)
    assert own == {"kept": 0.25, "tokens": [2], "nats": [3.5], "agree": [0.5]}


def test_losses_are_summed_up_beside_the_baseline_and_the_worst_text_is_told() -> None:
    told = summary({"loss": loss(10.0, 24.0, agree=0.5)}, {"loss": loss(10.0, 20.0)}, 0.5)
    assert told["bytes_10"] == 0.25
    assert told["loss_10"] == pytest.approx(34 / 8)
    assert told["worse_10"] == pytest.approx(34 / 30 - 1)
    assert told["worst_10"] == pytest.approx(0.2)
    assert told["worse_10_low"] == pytest.approx(0.0)
    assert told["worse_10_high"] == pytest.approx(0.2)
    assert told["agree_10"] == 0.5
    assert summary({"loss": loss(1.0)}, {}, 1.0) == {}


def test_gains_are_shared_out_by_kind_where_the_context_helps_the_baseline() -> None:
    full = {"tasks": gains(vt=[2.0, 2.0], qa=[4.0, 0.1], cwe=[0.2, 0.3])}
    told = summary({"tasks": gains(vt=[1.0, 1.0], qa=[4.0, -9.0], cwe=[0.0, 0.0])}, full, 1.0)
    assert told["unseen_vt"] == pytest.approx(0.5)
    assert told["unseen_qa"] == pytest.approx(1.0)
    assert told["unseen"] == pytest.approx(0.75)
    assert "unseen_cwe" not in told
    facts = {"facts": {"kept": 0.5, "gains": [1.0, -5.0, 2.0]}}
    told = summary(facts, {"facts": {"kept": 1.0, "gains": [2.0, 0.1, 4.0]}}, 1.0)
    assert told["facts_kept"] == pytest.approx(0.5)
    assert told["facts_low"] <= 0.5 <= told["facts_high"]


def test_instructions_are_summed_up_beside_what_is_asked_with_them() -> None:
    own = {"kept": 0.5, "fixed": 0.0, "gains": [1.0, 3.0, -2.0], "asked": [2.0]}
    full = {"kept": 1.0, "fixed": 0.0, "gains": [4.0, 4.0, 0.4], "asked": [2.5]}
    told = summary({"instructions": own}, {"instructions": full}, 0.5)
    assert told["bytes_instructions"] == 0.25
    assert told["instructions"] == pytest.approx(0.5)
    assert told["instructions_low"] <= 0.5 <= told["instructions_high"]
    assert told["asked"] == pytest.approx(0.8)


def test_a_folder_holds_what_is_measured_as_soon_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    results = Results(SETTINGS, VERSIONS, folder)
    assert written(folder) == []
    results.add(EVICT.name, row(EVICT), "loss", loss(2.2), 1.0)
    assert "worse_10" not in written(folder)[0]
    results.add(BASELINE.name, row(BASELINE), "loss", loss(2.0), 2.0)
    assert [line["cell"] for line in written(folder)] == [EVICT.name, "full"]
    assert float(written(folder)[0]["worse_10"]) == pytest.approx(0.1)
    assert {file.name for file in folder.iterdir()} == {"quality.json", "quality.csv"}


def test_what_is_there_is_not_missing_and_what_failed_is(tmp_path: Path) -> None:
    results = Results(SETTINGS, VERSIONS, tmp_path)
    results.add(BASELINE.name, row(BASELINE), "loss", loss(2.0), 1.0)
    results.fail(EVICT.name, row(EVICT), "loss", "ValueError: no")
    again = Results(SETTINGS, VERSIONS, tmp_path)
    assert again.rows == results.rows
    assert again.missing([BASELINE, EVICT], ["loss", "facts"]) == {
        BASELINE: ["facts"],
        EVICT: ["loss", "facts"],
    }
    assert written(tmp_path)[1]["error"] == "ValueError: no"
    again.add(EVICT.name, row(EVICT), "loss", loss(2.2), 1.0)
    assert again.missing([BASELINE, EVICT], ["loss"]) == {}
    assert written(tmp_path)[1]["error"] == ""


def test_a_folder_of_other_settings_or_versions_is_refused_and_left_alone(tmp_path: Path) -> None:
    Results(SETTINGS, VERSIONS, tmp_path).add(EVICT.name, row(EVICT), "loss", loss(1.0), 1.0)
    before = (tmp_path / "quality.json").read_text()
    others = dataclasses.replace(SETTINGS, prompts=(10, 40), task_prompts=(50,), threads=2)
    with pytest.raises(
        InvalidRequestError,
        match=r"measured with threads 1, here 2, prompts 10 20, here 10 40, task-prompts 40, here 50;",
    ):
        Results(others, VERSIONS, tmp_path)
    with pytest.raises(InvalidRequestError, match=r"policy 'pyramid' in version .*, here it is 99"):
        Results(SETTINGS, {**VERSIONS, "pyramid": "99"}, tmp_path)
    assert (tmp_path / "quality.json").read_text() == before


@pytest.mark.parametrize("content", ["some text", "[]", json.dumps({"settings": {}, "cells": {"a": {}}})])
def test_a_file_of_something_else_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(content)
    with pytest.raises(InvalidRequestError, match=r"quality.json is none that `bench quality` wrote"):
        Results(SETTINGS, VERSIONS, tmp_path)
    assert (tmp_path / "quality.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"file cannot be written: .*; give another folder"):
        Results(SETTINGS, VERSIONS, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "--threads is 0; it must be 1 or more"),
        ({"goes_on": 0}, "--goes-on is 0; it must be 1 or more"),
        ({"tasks": 0}, "--tasks is 0; it must be 1 or more"),
        ({"task_prompts": (0, 5)}, "--task-prompts has 0; they must be 1 or more"),
        ({"workloads": ("W9",)}, "workload 'W9' is neither"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_the_table_has_a_line_a_cell_and_errors_in_words() -> None:
    results, speed = Results(SETTINGS, VERSIONS), {"W1": {PREFILL: 1.5, DECODE: 100.0}}
    for cell, nats in ((BASELINE, 8.0), (EVICT, 8.8)):
        results.add(cell.name, row(cell), "loss", loss(nats), 1.0)
        results.add(cell.name, row(cell), "speed", speed, 1.0)
    results.fail("local@0.5", row(read_cell("local@0.5")), "loss", "A|B: c")
    lines = table(results).splitlines()
    whole = "100.0%, 100.0% to 100.0%"
    assert lines[2] == f"| full | 0.500 | 2.000 | {whole} | 1.50 | 100.0 |"
    told = f"2.200 (+10.00%, +10.00% to +10.00%) | {whole} | 1.50 | 100.0"
    assert lines[3] == f"| pyramid/evict:int8+turn@0.25 | 0.500 | {told} |"
    assert lines[4] == "| local@0.5 | A/B: c |"
    assert {line.count("|") for line in lines[:4]} == {7}
