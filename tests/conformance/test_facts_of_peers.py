"""What peers are asked about a document are the words of our own talks."""

from pathlib import Path

import pytest

from bench.peers.quality import passages, record
from bench.peers.reading import Reading
from workers.bench.cell import BASELINE, Holding
from workers.bench.facts import Asking, talks
from workers.bench.parts.facts import Facts
from workers.bench.parts.part import FULL
from workers.budget.kv_share import KVShare
from workers.engine.engine import Engine, EngineConfig


def test_what_one_reading_behind_the_first_turn_gains_is_what_the_turns_gain(embedded: Path) -> None:
    asking = Asking(Engine(EngineConfig(str(embedded), dtype="float32", kv_bytes=256 << 20)))
    facts = Facts(talks(asking.tokenizer, 200, 2, 1), 200)
    facts.begin(asking)
    holding = Holding(BASELINE, KVShare(1.0))
    own = facts.measure(asking, holding, None, lambda _: None)
    sets = passages(facts)
    reads = []
    for each in sets["facts"]:
        read = asking.judge.read([*each.context, *each.question], each.answer, FULL)
        reads.append(Reading(list(read.log_probabilities), list(read.likeliest), read.kept))
    told = record(facts, sets, reads, {})
    assert told["gains"] == pytest.approx(own["gains"], abs=2e-3)
    assert len(told["gains"]) == 8
    assert told["kept"] == 1
