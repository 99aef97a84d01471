"""`docs/policies.md` says what there is, and its example runs as a package of its own."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from policy_package import installed_policies

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import LoopEvent, SequenceBroken, SequenceFinished, SequenceTokens
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
        knobs = [
            (name, str(default), allowed.replace("|", " or "))
            for name, default, allowed, _ in describe(each)
        ]
        known += [(each.name, *knob) for knob in knobs or [("", "", "")]]
    assert written == known


def engine_with(policy: str, checkpoint: Path) -> Engine:
    enable([policy])
    config = EngineConfig(
        str(checkpoint), dtype="float32", boundaries=(2,), kv_bytes=8 << 20, policies=(policy,)
    )
    return Engine(config)


def test_the_example_is_served_and_keeps_what_its_plan_says(
    installed: str, toy: Callable[[str], Path]
) -> None:
    engine = engine_with(installed, toy("gqa"))
    compression = Compression(installed, kv_keep=0.4)
    kept = plan(compression, 150, engine.model.layers).kept
    assert kept == (60,) * engine.model.layers
    stopping = Stopping(100, ignore_eos=True)
    requests = [
        EngineRequest(list(range(3, 153)), stopping=stopping, compression=each, trace=True)
        for each in (compression, Compression("h2o", kv_keep=0.4), Compression(installed, kv_keep=1.0))
    ]
    shorter, other, _ = engine.trace(requests)
    assert shorter.traced is not None
    assert other.traced is not None
    positions, others = (
        [own for shard in traced.shards for own in shard.positions]
        for traced in (shorter.traced, other.traced)
    )
    # One set serves all heads, and it is not what H2O keeps in any of them.
    assert [own.shape for own in positions] == [(1, count) for count in kept]
    differ = [
        set(own[0]) ^ set(each) for own, heads in zip(positions, others, strict=True) for each in heads
    ]
    assert all(differ)
    # Once 99 tokens were fed, 8 at once have gone.
    assert [own.shape[1] for own in shorter.positions] == [60 + 99 % 8] * engine.model.layers
    assert [set(own[0, -15:]) for own in shorter.positions] == [set(range(234, 249))] * engine.model.layers
    assert shorter.reply.receipt.kv_keep_reached == pytest.approx(0.4, abs=0.02)
    assert shorter.reply.receipt.spilled_bytes > 0
    engine.check_integrity()


def test_a_choice_that_fails_ends_its_request_alone(tmp_path: Path, toy: Callable[[str], Path]) -> None:
    code = """
from workers.policies.capacity import hold
from workers.policies.full import FullKnobs
from workers.policies.policy import Policy

def choose(observed, tokens, keep, knobs):
    raise RuntimeError("the oracle is silent")

def plan(target, knobs):
    return hold(target, (20,) * target.layers, 0, 4)

POLICY = Policy("silent", "1", "", FullKnobs, plan, choose)
"""
    with installed_policies(tmp_path, "silent_policy", code, {"silent": "POLICY"}):
        engine = engine_with("silent", toy("gqa"))
        stopping = Stopping(30, ignore_eos=True)
        silent = Compression("silent")
        prompts = {"in its prompt": list(range(3, 43)), "while it generates": [5, 6, 7]}
        full = EngineRequest(list(range(3, 43)), stopping=stopping)
        (alone,) = engine.generate([full])
        for prompt in prompts.values():
            request = EngineRequest(prompt, stopping=stopping, compression=silent)
            numbers = [engine.submit(each)[0] for each in (request, full)]
            events: list[LoopEvent] = []
            while not engine.idle:
                events += engine.step()
            (broken,) = (event for event in events if isinstance(event, SequenceBroken))
            assert broken.sequence == numbers[0]
            error = broken.error("r")
            assert error.reason == "policy_failed"
            assert "RuntimeError: the oracle is silent" in error.message
            (finished,) = (event for event in events if isinstance(event, SequenceFinished))
            assert finished.receipt.output_tokens == alone.receipt.output_tokens
            said = [event.tokens for event in events if isinstance(event, SequenceTokens)]
            assert alone.token_ids[-1] in {token for tokens in said for token in tokens.token_ids}
            engine.check_integrity()
