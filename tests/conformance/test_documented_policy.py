"""`docs/policies.md` says what there is, and its example runs as a package of its own."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from policy_package import installed_policies

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.policies.policy import describe
from workers.policies.registry import BUILT_IN, enable, plan

DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
ROW = re.compile(r"^\| (?:`(\w+)`)? ?\|.*\| (?:`(\w+)`)? ?\| (\S*) ?\| (.*?) ?\|$", re.MULTILINE)


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[str]:
    """The example's name, once its package is where an installer leaves it."""
    (code,) = re.findall(r"```python\n(\"\"\".*?)```", DOCUMENT, re.DOTALL)
    ((name, module),) = re.findall(r"^(\w+) = \"(\w+):POLICY\"$", DOCUMENT, re.MULTILINE)
    with installed_policies(tmp_path, module, code, {name: "POLICY"}):
        yield name


def test_the_table_has_every_policy_and_knob_with_its_default() -> None:
    written, policy = [], ""
    for name, knob, default, allowed in ROW.findall(DOCUMENT):
        policy = name or policy
        written.append((policy, knob, default, allowed))
    known = []
    for each in BUILT_IN:
        knobs = [(name, str(default), allowed) for name, default, allowed, _ in describe(each)]
        known += [(each.name, *knob) for knob in knobs or [("", "", "")]]
    assert written == known


def test_the_example_is_served_and_keeps_what_its_plan_says(
    installed: str, toy: Callable[[str], Path]
) -> None:
    enable([installed])
    engine = Engine(
        EngineConfig(
            str(toy("gqa")), dtype="float32", boundaries=(2,), kv_bytes=8 << 20, policies=(installed,)
        )
    )
    compression = Compression(installed, kv_keep=0.4)
    kept = plan(compression, 150, engine.model.layers).kept
    assert kept == tuple(sorted(kept))
    stopping = Stopping(100, ignore_eos=True)
    requests = [
        EngineRequest(list(range(3, 153)), stopping=stopping, compression=each, trace=True)
        for each in (compression, Compression(installed, kv_keep=1.0), Compression())
    ]
    shorter, _, _ = engine.trace(requests)
    assert shorter.traced is not None
    positions = [own for shard in shorter.traced.shards for own in shard.positions]
    assert tuple(map(len, positions)) == kept
    assert shorter.reply.receipt.kv_keep_reached == pytest.approx(0.4, abs=0.02)
    assert shorter.reply.receipt.spilled_bytes > 0
    engine.check_integrity()
