"""On a Ray cluster that is shared, what others have deployed is not touched."""

import pytest
from fake_serve import FakeServe, application

from cluster.config import ClusterConfig
from cluster.deploy import deployed
from cluster.deploy.deployment import DEFAULT_DEPLOYMENT, Deployment, read_deployment
from pyramidserve.errors import ConfigurationError

THEIRS = application("theirs", "somebody.elses:app", size=3)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    """A cluster with an application from a file and one of `serve.run`, and a config of one that went."""
    fake = FakeServe(states={"made": "RUNNING"}, target_capacity=50.0)
    fake.add(THEIRS)
    fake.configs["gone"] = application("gone", port=1)
    fake.replace(monkeypatch)
    return fake


def test_an_application_comes_beside_the_others_and_goes_alone(serve: FakeServe) -> None:
    ours = application("pyramidserve", model="m")
    deployed.put(ours)
    assert serve.states.keys() == {"theirs", "made", "pyramidserve"}
    assert serve.calls == [{"theirs": {"size": 3}, "pyramidserve": {"model": "m"}}]
    assert serve.configs["theirs"] == THEIRS
    assert serve.target_capacity == 50.0
    deployed.take_away("pyramidserve")
    assert serve.states.keys() == {"theirs", "made"}
    deployed.await_gone("pyramidserve", 0.0)


def test_what_is_not_from_a_file_is_not_taken_away(serve: FakeServe) -> None:
    deployed.take_away("made")
    deployed.take_away("nothing")
    assert serve.calls == []


@pytest.mark.parametrize(
    ("name", "port", "says"),
    [
        ("pyramidserve", 1, r"pyramidserve is deployed already; `pyramidserve rollout`"),
        ("theirs", 1, "named theirs that is not ours is deployed; give yours another name"),
        ("made", 1, "named made that is not ours is deployed"),
        ("other", 8700, "pyramidserve listens on 127.0.0.1:8700; choose another router_port"),
        ("other", 8701, "pyramidserve listens on 127.0.0.1:8701; choose another router_port"),
        ("other", 1, ""),
        ("going", 1, ""),
    ],
)
def test_a_name_or_a_place_that_is_taken_is_refused(
    serve: FakeServe, name: str, port: int, says: str
) -> None:
    serve.add(application("pyramidserve", model="m"))
    serve.states["going"] = "DELETING"
    there, config = deployed.look(), ClusterConfig(router_port=port, http_port=0, metrics_port=0)
    assert there.ours() == ["pyramidserve"]
    if not says:
        deployed.check_place(there, name, config)
        return
    with pytest.raises(ConfigurationError, match=says):
        deployed.check_place(there, name, config)


def test_what_does_not_go_is_named(serve: FakeServe) -> None:
    with pytest.raises(ConfigurationError, match="theirs did not go in 0 s"):
        deployed.await_gone("theirs", 0.0)


def test_the_logging_of_a_file_is_its_applications_alone() -> None:
    raw = DEFAULT_DEPLOYMENT | {"logging_config": {"log_level": "DEBUG"}}
    config = deployed.application_of(Deployment(raw, read_deployment(None).config)).logging_config
    assert config is not None
    assert config.log_level == "DEBUG"
    assert deployed.application_of(read_deployment(None)).logging_config is None


def test_a_wrong_value_is_named() -> None:
    raw = DEFAULT_DEPLOYMENT | {"target_capacity": "much"}
    with pytest.raises(ConfigurationError, match="target_capacity"):
        deployed.application_of(Deployment(raw, read_deployment(None).config))
