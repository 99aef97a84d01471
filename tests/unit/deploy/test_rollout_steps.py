"""A rollout keeps the application's name, whatever cuts it off, and touches no other application."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from cluster_process import write_config
from fake_serve import FakeServe, application

from cluster.deploy import rollout
from cluster.deploy.deployment import Deployment, read_deployment
from pyramidserve.errors import ConfigurationError

NAME, STAND_IN = "pyramidserve", "pyramidserve-stand-in"
OLD, NEW = {"model": "old"}, {"model": "new"}
THEIRS = {"theirs": {"size": 3}}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    """A cluster that serves the old version beside others' applications."""
    fake = FakeServe(states={"made": "RUNNING"})
    fake.add(application("theirs", "somebody.elses:app", size=3))
    fake.add(application(NAME, **OLD))
    fake.replace(monkeypatch)
    monkeypatch.setattr(rollout, "joined", lambda address, progress: nullcontext())
    return fake


@pytest.fixture
def roll_out(tmp_path: Path) -> Callable[[], None]:
    deployment = read_deployment(write_config(tmp_path / "new.yaml", model="new", http_port=8701))
    raw = deployment.raw | {"applications": [{**deployment.raw["applications"][0], "args": NEW}]}
    return lambda: rollout.roll_out(Deployment(raw, deployment.config), "auto", lambda message: None)


def after(serve: FakeServe) -> dict[str, dict[str, Any]]:
    """What is left when a rollout has ended, which must be no key, and `serve.run`'s application."""
    assert serve.keys == {}
    assert serve.states["made"] == "RUNNING"
    assert serve.states.keys() - {"made"} == serve.configs.keys()
    return serve.calls[-1]


def test_the_new_version_ends_under_the_name_of_the_old_one(
    serve: FakeServe, roll_out: Callable[[], None]
) -> None:
    roll_out()
    assert serve.calls == [
        THEIRS | {NAME: OLD, STAND_IN: NEW},
        THEIRS | {STAND_IN: NEW},
        THEIRS | {STAND_IN: NEW, NAME: NEW},
        THEIRS | {NAME: NEW},
    ]
    assert serve.taking_over == [STAND_IN, NAME]
    assert after(serve) == THEIRS | {NAME: NEW}
    # As `serve deploy` would write it: for Serve, the same file again is the same application.
    assert serve.configs[NAME] == application(NAME, **NEW)


@pytest.mark.parametrize("failure", [ConfigurationError("no room"), KeyboardInterrupt()])
def test_a_rollout_that_is_cut_off_before_the_old_version_drains_changes_nothing(
    serve: FakeServe, roll_out: Callable[[], None], failure: BaseException
) -> None:
    def fail(name: str) -> None:
        raise failure

    serve.awaited = fail
    with pytest.raises(type(failure)):
        roll_out()
    assert after(serve) == THEIRS | {NAME: OLD}


def test_one_that_is_cut_off_later_is_finished(serve: FakeServe, roll_out: Callable[[], None]) -> None:
    interrupts = [KeyboardInterrupt()]

    def interrupt(name: str) -> None:
        if name == NAME and interrupts:
            raise interrupts.pop()

    serve.awaited = interrupt
    with pytest.raises(KeyboardInterrupt):
        roll_out()
    assert after(serve) == THEIRS | {NAME: NEW}


def test_a_stand_in_goes_on_when_the_last_step_fails_and_the_next_rollout_begins_there(
    serve: FakeServe, roll_out: Callable[[], None]
) -> None:
    def fail(name: str) -> None:
        if name == NAME:
            raise ConfigurationError("no room")

    serve.awaited = fail
    with pytest.raises(ConfigurationError, match=f"no room; {STAND_IN} serves meanwhile"):
        roll_out()
    assert serve.calls[-1] == THEIRS | {STAND_IN: NEW}
    serve.awaited = lambda name: None
    roll_out()
    assert after(serve) == THEIRS | {NAME: NEW}


def test_a_stand_in_that_was_left_beside_the_old_version_goes_first(
    serve: FakeServe, roll_out: Callable[[], None]
) -> None:
    serve.add(application(STAND_IN, model="lost"))
    roll_out()
    assert serve.calls[0] == THEIRS | {NAME: OLD}
    assert after(serve) == THEIRS | {NAME: NEW}


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (application("chat"), "no application of ours is named pyramidserve: served are chat"),
        (application(NAME, "somebody.elses:app"), "nothing of ours is served there"),
        (application(NAME, router_port=1), "listen on 127.0.0.1:8700, and pyramidserve is on 127.0.0.1:1"),
        (application(NAME, router_host="::"), "pyramidserve is on :::870"),
    ],
)
def test_only_one_of_that_name_and_place_is_replaced(
    serve: FakeServe, roll_out: Callable[[], None], there: object, says: str
) -> None:
    del serve.configs[NAME], serve.states[NAME]
    serve.add(there)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=says):
        roll_out()
    assert serve.calls == []
