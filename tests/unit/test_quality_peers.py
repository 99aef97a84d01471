"""Peers read the passages that cells read, and what they found becomes a row beside them."""

import sys
from pathlib import Path

import pytest

from bench.peers import quality
from bench.peers.quality import passages, read_settings, readings, record, row_of, ways
from bench.peers.reading import Passage, Reading
from pyramidserve.errors import InvalidRequestError
from workers.bench.parts import passages as own
from workers.bench.parts.passages import Passages
from workers.bench.parts.tasks import Tasks
from workers.bench.results import Results
from workers.bench.settings import QualitySettings
from workers.bench.tasks import Item

SETTINGS = QualitySettings("random:toy", "bfloat16", "cpu", 1, (10, 20), 4, 1, 1, 30, (40,), 1, ("W1",))
TEXTS = Passages({"10": [own.Passage([1, 2], [3, 4])], "20": [own.Passage([5], [6])]})
TASKS = Tasks([Item("vt 40 0", (1, 2, 3, 4), 3, (4,), (5, 6))])
PEER = """
from bench.peers.reading import Reading, answer

def read(job):
    print("libraries talk")
    for passage in job.passages:
        if passage.context == [0]:
            raise ValueError("no such token")
        yield Reading([-job.share] * len(passage.answer), passage.answer, 0.5)

answer(read)
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds everything as likely as it keeps."""
    script = tmp_path / "python"
    (tmp_path / "peer.py").write_text(PEER)
    script.write_text(f'#!/bin/sh\nexec env PYTHONPATH=. {sys.executable} {tmp_path / "peer.py"} "$3"\n')
    script.chmod(0o755)
    monkeypatch.setattr(quality, "PYTHON", script)


def test_what_is_compressed_with_its_question_and_without_it_is_the_same_in_all() -> None:
    sets = passages(TASKS)
    assert sets == {
        "seen": [Passage([1, 2, 3, 4], [], [5, 6])],
        "unseen": [Passage([1, 2, 3], [4], [5, 6])],
    }
    assert passages(TEXTS) == {"10": [Passage([1, 2], [], [3, 4])], "20": [Passage([5], [], [6])]}


def test_readings_are_shared_out_to_the_sets_that_they_are_of() -> None:
    full = {"10": {"likeliest": ["3 9"]}, "20": {"likeliest": ["6"]}}
    read = [Reading([-1.0, -2.0], [3, 4], 0.5), Reading([-4.0], [6], 0.25)]
    found = record(TEXTS, passages(TEXTS), read, full)
    assert found["10"] == {"kept": 0.5, "tokens": [2], "nats": [3.0], "agree": [0.5]}
    assert found["20"] == {"kept": 0.25, "tokens": [1], "nats": [4.0], "agree": [1.0]}


@pytest.mark.usefixtures("peer")
def test_a_peer_reads_all_passages_in_a_process_of_its_own_or_says_why_not() -> None:
    some = [Passage([1], [], [2, 3]), Passage([1], [2], [3])]
    assert readings(SETTINGS, "kvzip", 0.25, some) == [
        Reading([-0.25, -0.25], [2, 3], 0.5),
        Reading([-0.25], [3], 0.5),
    ]
    with pytest.raises(RuntimeError, match=r"exit code 1: .*no such token"):
        readings(SETTINGS, "kvzip", 0.25, [*some, Passage([0], [], [1])])


def test_what_holds_all_tokens_is_measured_once_and_others_at_each_share() -> None:
    assert list(ways(["kvzip", "int4"], [0.25, 0.12])) == [
        ("kvzip", 0.25),
        ("kvzip", 0.12),
        ("int4", None),
    ]
    assert row_of("int4").method == "transformers int4"
    assert row_of("kvzip").method == "kvpress kvzip"


def test_a_peer_reads_with_the_settings_of_the_results_beside_it(tmp_path: Path) -> None:
    Results(SETTINGS, {}, tmp_path)
    assert read_settings(tmp_path / "quality.json") == SETTINGS
    with pytest.raises(
        InvalidRequestError, match=r"none that `bench quality` wrote .*; measure there first"
    ):
        read_settings(tmp_path / "nothing.json")
