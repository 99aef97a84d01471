"""A deployment that cannot come up says why at once."""

from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
)

from cluster.config import ClusterConfig
from cluster.deploy import readiness
from cluster.deploy.readiness import await_ready, reason_of
from pyramidserve.errors import ConfigurationError

# As Serve 2.60 has it in the message of a deployment.
FAILED = """A replica failed to start with exception. Retrying {left} more time(s). Error:
Traceback (most recent call last):
  File "/python/workers/shard.py", line 107, in __init__
    stage = await in_own_thread(partial(self._load, checkpoint, model))
{error}
"""
POOL = (
    "pyramidserve.errors.ConfigurationError: kv_bytes is 107374182400, but beside the weights there is less"
)
NO_FOLDER = "pyramidserve.errors.CheckpointError: '/models/7b' is neither a folder nor known"
TRANSIENT = "TimeoutError: the gang is not there"


def status(state: ApplicationStatus, error: str = "") -> ApplicationStatusOverview:
    parts = {"Router": "", "Shard": FAILED.format(left=2, error=error) if error else ""}
    deployments = {
        name: DeploymentStatusOverview("UPDATING", "CONFIG_UPDATE", {}, message)  # type: ignore[arg-type]
        for name, message in parts.items()
    }
    return ApplicationStatusOverview(state, "", 0.0, deployments)


def serve_says(monkeypatch: pytest.MonkeyPatch, *answers: ApplicationStatusOverview) -> list[object]:
    """Lets Serve give these answers one after the other, and the last one from then on."""
    left = list(answers)
    monkeypatch.setattr(readiness, "POLL_SECONDS", 0.0)

    def say() -> SimpleNamespace:
        return SimpleNamespace(applications={"a": left.pop(0) if len(left) > 1 else left[0]})

    monkeypatch.setattr(serve, "status", say)
    return left  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("error", "says"), [(POOL, "kv_bytes is 107374182400"), (NO_FOLDER, "'/models/7b'")]
)
def test_a_fault_of_the_deployment_ends_the_wait_at_the_first_try(
    monkeypatch: pytest.MonkeyPatch, error: str, says: str
) -> None:
    serve_says(monkeypatch, status(ApplicationStatus.DEPLOYING, error))
    with pytest.raises(ConfigurationError) as raised:
        await_ready("a", ClusterConfig(), 60.0)
    assert raised.value.message.startswith("the deployment failed: ")
    assert says in raised.value.message
    assert "Traceback" not in raised.value.message


def test_what_may_go_by_itself_is_waited_for_as_long_as_serve_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trying, given_up = ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOY_FAILED
    left = serve_says(monkeypatch, status(trying, TRANSIENT), status(given_up, TRANSIENT))
    with pytest.raises(ConfigurationError, match="the deployment failed: the gang is not there"):
        await_ready("a", ClusterConfig(), 60.0)
    assert len(left) == 1
    serve_says(monkeypatch, status(trying, TRANSIENT))
    with pytest.raises(ConfigurationError, match=r"a was not ready after 0.05 s: the gang is not there"):
        await_ready("a", ClusterConfig(), 0.05)


def test_the_router_is_asked_by_way_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[int, str] | TimeoutError] = [
        TimeoutError(),
        (0, "10.0.0.7:8700"),
        (2, "10.0.0.7:8700"),
    ]

    def answer(timeout_s: float) -> tuple[int, str]:
        said = answers.pop(0)
        if isinstance(said, TimeoutError):
            raise said
        return said

    call = SimpleNamespace(remote=lambda: SimpleNamespace(result=answer))
    handle = SimpleNamespace(pipelines_and_address=call)
    monkeypatch.setattr(serve, "get_app_handle", {"a": handle}.__getitem__)
    serve_says(monkeypatch, status(ApplicationStatus.DEPLOYING), status(ApplicationStatus.RUNNING))
    assert await_ready("a", ClusterConfig(pipelines=2), 60.0) == "10.0.0.7:8700"
    assert answers == []


def test_a_message_without_an_error_is_the_reason() -> None:
    assert reason_of("no room: for it") == ("", "no room: for it")
