"""What Serve has deployed, ours and others': one application is put in or taken out, by name.

Serve's call takes all applications that were deployed from files and deletes those that are missing, so
the others are handed back to it as they are.
"""

import time
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.config import ClusterConfig, places_of
from cluster.deploy.deployment import IMPORT_PATH, Deployment
from pyramidserve.errors import ConfigurationError
from workers import ray_private

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Deployed:
    """All applications of a Ray cluster.

    Attributes:
        states: of each by name, as Serve calls them; those made by `serve.run`, and those that go, too.
        configs: of those that were deployed from files and stay.
        target_capacity: of the whole, as Serve has it.
    """

    states: dict[str, str]
    configs: dict[str, ServeApplicationSchema]
    target_capacity: float | None = None

    def is_ours(self, name: str) -> bool:
        """Whether that application is one of ours, and stays."""
        return name in self.configs and self.configs[name].import_path == IMPORT_PATH

    def ours(self) -> list[str]:
        """The names of our applications."""
        return [name for name in self.configs if self.is_ours(name)]

    def with_application(self, application: ServeApplicationSchema) -> ServeDeploySchema:
        """All that is to be deployed when ``application`` is, in the place of one of its name."""
        return self._schema({**self.configs, application.name: application})

    def without(self, name: str) -> ServeDeploySchema:
        """All that is to be deployed when that application goes."""
        return self._schema({each: app for each, app in self.configs.items() if each != name})

    def _schema(self, configs: dict[str, ServeApplicationSchema]) -> ServeDeploySchema:
        return ServeDeploySchema(applications=list(configs.values()), target_capacity=self.target_capacity)


def look() -> Deployed:
    """What is deployed on the Ray cluster that this process has joined."""
    details, configs = ray_private.deployed()
    applications: dict[str, dict[str, Any]] = details.get("applications", {})
    return Deployed(
        states={name: each["status"] for name, each in applications.items()},
        # Configs of what has gone, or was replaced by `serve.run`, are kept by Serve.
        configs={
            name: configs[name]
            for name, each in applications.items()
            if each["source"] == "declarative" and each["status"] != "DELETING" and name in configs
        },
        target_capacity=details.get("target_capacity"),
    )


def application_of(deployment: Deployment) -> ServeApplicationSchema:
    """The application of a deployment file, for Serve. Raises ConfigurationError on wrong values."""
    try:
        schema = ServeDeploySchema.model_validate(deployment.raw)
    except ValidationError as error:
        raise ConfigurationError(f"that is not a Serve config file: {error}") from error
    (application,) = schema.applications
    if application.logging_config is None and schema.logging_config is not None:
        # Of the whole file, which is ours alone: the other applications keep their own.
        application = application.model_copy(update={"logging_config": schema.logging_config})
    return application


def put(application: ServeApplicationSchema) -> None:
    """Deploys ``application`` beside what is there, or in the place of the one that has its name."""
    ray_private.deploy(look().with_application(application))


def take_away(name: str) -> None:
    """Lets an application of ours go, if it is there; it drains by itself."""
    deployed = look()
    if name in deployed.configs:
        ray_private.deploy(deployed.without(name))


def await_gone(name: str, patience: float) -> None:
    """Waits ``patience`` seconds until that application has gone. Raises ConfigurationError if it stays."""
    deadline = time.monotonic() + patience
    while name in look().states:
        if time.monotonic() > deadline:
            raise ConfigurationError(f"{name} did not go in {patience:g} s")
        time.sleep(POLL_SECONDS)


def check_place(deployed: Deployed, name: str, config: ClusterConfig) -> None:
    """Raises ConfigurationError when a new application cannot have that name or place."""
    if deployed.is_ours(name):
        raise ConfigurationError(
            f"{name} is deployed already; `pyramidserve rollout` puts a new version in its place, and "
            "another name of the application serves beside it"
        )
    if deployed.states.get(name, "DELETING") != "DELETING":
        raise ConfigurationError(
            f"an application named {name} that is not ours is deployed; give yours another name"
        )
    for each in deployed.ours():
        taken = places(deployed.configs[each]).values()
        for port, place in config.places.items():
            if place in taken:
                raise ConfigurationError(f"{each} listens on {place[0]}:{place[1]}; choose another {port}")


def places(application: ServeApplicationSchema) -> dict[str, tuple[str, int]]:
    """Where clients find one of ours, as it is told to listen."""
    said = application.args
    return places_of(
        said.get("router_host", ClusterConfig.router_host),
        said.get("router_port", ClusterConfig.router_port),
        said.get("http_port", ClusterConfig.http_port),
        said.get("metrics_port", ClusterConfig.metrics_port),
    )
