"""Puts a new deployment in the place of the one that serves, so that no stream is lost."""

import re
import time

import ray
from ray import serve
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.config import ClusterConfig, parse_config
from cluster.deploy.deployment import Deployment, Progress, check_files
from cluster.deploy.serving import NODES_SECONDS, POLL_SECONDS, await_running, join
from pyramidserve.errors import ConfigurationError
from workers import ray_private

IMPORT_PATH = "cluster.app:build"


def roll_out(deployment: Deployment, address: str, progress: Progress) -> None:
    """Deploys beside what serves, lets the new router take over its port, then lets the old one drain.

    Streams that the old one does not end within its ``drain_seconds`` go on at the new one, with what
    it serves. Needs room for both at once. When the new one does not come up, the old one goes on alone.

    Args:
        deployment: its router must have the port of the one that serves, and the same Ray cluster.
        address: of that cluster.

    Raises ConfigurationError when nothing is served there, or at another port, or the new one does not
    come up.
    """
    check_files(deployment.config, progress)
    join(address, progress)
    try:
        old = applications()
        if not old:
            raise ConfigurationError(
                f"nothing of ours is served on the Ray cluster at {address!r}; use `pyramidserve serve`"
            )
        for each in old:
            check_place(deployment.config, parse_config(each.args))
        new = successor(deployment.schema.applications[0], [each.name for each in old])
        names = ", ".join(each.name for each in old)
        progress(f"deploying {new.name} beside {names}")
        everything = deployment.schema.model_copy(update={"applications": [*old, new]})
        ray_private.deploy(everything)
        try:
            await_running(new.name, NODES_SECONDS)
        except ConfigurationError:
            progress(f"taking {new.name} away again; {names} goes on")
            ray_private.deploy(deployment.schema.model_copy(update={"applications": old}))
            raise
        progress(f"{new.name} serves; {names} drains")
        ray_private.deploy(deployment.schema.model_copy(update={"applications": [new]}))
        _await_gone([each.name for each in old])
    finally:
        ray.shutdown()


def applications() -> list[ServeApplicationSchema]:
    """Ours, as they were deployed."""
    configs = (
        ServeDeploySchema.model_validate({"applications": [each]}) for each in ray_private.deployed()
    )
    return [app for config in configs for app in config.applications if app.import_path == IMPORT_PATH]


def successor(application: ServeApplicationSchema, taken: list[str]) -> ServeApplicationSchema:
    """The application under a name of its own, with a router that takes over."""
    stem = re.sub(r"-\d+$", "", application.name)
    numbers = (name.removeprefix(f"{stem}-") for name in taken)
    last = max((int(number) for number in numbers if number.isdigit()), default=1)
    return application.model_copy(
        update={"name": f"{stem}-{last + 1}", "args": {**application.args, "take_over": True}}
    )


def check_place(new: ClusterConfig, old: ClusterConfig) -> None:
    """Raises ConfigurationError unless clients find the new router where the old one is."""
    for name in ("router_host", "router_port"):
        if getattr(new, name) != getattr(old, name):
            raise ConfigurationError(
                f"{name} is {getattr(new, name)!r} and of what serves {getattr(old, name)!r}; "
                "give the same, as clients go on calling there"
            )


def _await_gone(names: list[str]) -> None:
    deadline = time.monotonic() + NODES_SECONDS
    while time.monotonic() < deadline:
        if not set(names) & set(serve.status().applications):
            return
        time.sleep(POLL_SECONDS)
    raise ConfigurationError(f"{', '.join(names)} did not go in {NODES_SECONDS:g} s")
