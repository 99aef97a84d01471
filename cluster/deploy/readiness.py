"""Whether a deployment serves, as Serve and its router say; why it does not."""

import re
import time

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.config import ClusterConfig
from cluster.deploy.deployed import POLL_SECONDS
from pyramidserve import errors
from pyramidserve.errors import ConfigurationError

# The last line of a traceback; Serve has it in the middle of a message.
ERROR_LINE = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception)): (.+)", re.MULTILINE)
ANSWER_SECONDS = 10.0


def await_ready(name: str, config: ClusterConfig, patience: float) -> str:
    """Waits ``patience`` seconds until the application has all its pipelines attached to its router.

    Both are asked by way of Serve, from any node, and however the router is guarded.

    Returns: where the router listens.

    Raises ConfigurationError, with the reason, as soon as it is clear that it will not come up.
    """
    deadline = time.monotonic() + patience
    problem = ""
    while time.monotonic() < deadline:
        overview = serve.status().applications.get(name)
        if overview is not None and overview.status == ApplicationStatus.RUNNING:
            problem = f"fewer than {config.pipelines} pipeline(s) have attached to the router"
            router = _ask(name)
            if router is not None and router[0] >= config.pipelines:
                return router[1]
        elif overview is not None:
            problem = _problem(overview)
        time.sleep(POLL_SECONDS)
    raise ConfigurationError(f"{name} was not ready after {patience:g} s: {problem}")


def _ask(name: str) -> tuple[int, str] | None:
    """How many pipelines the router has, and where it listens; None where it does not answer."""
    try:
        answer: tuple[int, str] = (
            serve.get_app_handle(name).pipelines_and_address.remote().result(timeout_s=ANSWER_SECONDS)
        )
    except (RayError, RayServeException, TimeoutError):
        return None
    return answer


def _problem(overview: ApplicationStatusOverview) -> str:
    """What keeps an application from running. Raises ConfigurationError where waiting does not help."""
    details = [each.message for each in overview.deployments.values() if each.message]
    message = "; ".join(filter(None, [overview.message, *details]))
    failed = overview.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
    kind, reason = reason_of(message)
    if failed or lasts(kind):
        raise ConfigurationError(f"the deployment failed: {reason}")
    return reason


def reason_of(message: str) -> tuple[str, str]:
    """The kind and the text of the last error that a message tells of; "" and all of it if of none."""
    found = ERROR_LINE.findall(message)
    return found[-1] if found else ("", message)


def lasts(kind: str) -> bool:
    """Whether an error of that kind comes again however often a replica is started."""
    known = getattr(errors, kind, None)
    return isinstance(known, type) and issubclass(known, ConfigurationError)
