"""Policies of other packages are there once they are named, and what they are not is said."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from policy_package import installed_policies

from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression
from workers.policies.policy import Policy, describe
from workers.policies.registry import BUILT_IN, enable, plan, skew, versions
from workers.policies.valid import validate

HALVES = """
from dataclasses import dataclass
from workers.budget.plan import KeepPlan
from workers.policies.policy import Policy, knob

@dataclass(frozen=True)
class Knobs:
    share: float = knob(0.5, "(0, 1]", "of the prompt that stays")

def plan(target, knobs):
    kept = max(1, int((target.kv_keep or knobs.share) * target.prompt_tokens))
    return KeepPlan(target.prompt_tokens, (kept,) * target.layers, recent=kept)

POLICY = Policy("halves", "7", "the newest half", Knobs, plan)
OTHER = Policy("other", "1", "named as none is", Knobs, plan)
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path) -> Iterator[None]:
    """A package with a policy, with one under another name, and with none."""
    named = {"halves": "POLICY", "misnamed": "OTHER", "broken": "NOTHING"}
    with installed_policies(tmp_path, "halves_of_others", HALVES, named):
        yield


def test_one_that_is_named_can_be_asked_for_with_its_knobs() -> None:
    with pytest.raises(InvalidRequestError, match="unknown policy 'halves'; known are full"):
        validate(Compression("halves"))
    enable(["halves"])
    enable(["halves"])
    validate(Compression("halves", parameters={"share": 0.25}))
    assert plan(Compression("halves", parameters={"share": 0.25}), 100, 3).kept == (25, 25, 25)
    assert plan(Compression("halves", kv_keep=0.1), 100, 3).kept == (10, 10, 10)
    with pytest.raises(InvalidRequestError, match=r"share is 2; it must be in \(0, 1\]"):
        validate(Compression("halves", parameters={"share": 2}))
    assert versions(["halves"])["halves"] == "7"
    assert "halves" not in versions()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("thirds", "policies names 'thirds', which is not installed; .*: broken, halves, misnamed"),
        ("misnamed", "'halves_of_others:OTHER' is .* must be a Policy whose name is 'misnamed'"),
        ("broken", "policy 'broken' of 'halves_of_others:NOTHING' cannot be loaded: AttributeError"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        enable([name])


def test_a_skew_of_versions_is_told_by_name() -> None:
    assert skew(versions(), versions()) == ""
    assert skew({"a": "1", "b": "2"}, {"b": "3", "c": "1"}) == (
        "policy 'a' in version 1 here and none there; policy 'b' in version 2 here and 3 there; "
        "policy 'c' in version none here and 1 there"
    )


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda policy: policy.name)
def test_every_knob_says_what_it_means_and_its_default_is_allowed(policy: Policy) -> None:
    for name, default, allowed, meaning in describe(policy):
        assert len(meaning) > 5
        assert allowed
        validate(Compression(policy.name, parameters={name: default}))
