"""Serves what a Serve config file says, on a Ray cluster of its own or on one that is there."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster.app import ROUTER_RESOURCE, demand, shard_settings
from cluster.config import ClusterConfig, parse_config
from cluster.edge.server import port_problem, server_credentials
from cluster.edge.tenants import first_token, read_tenants
from pyramidserve import Client
from pyramidserve.errors import ConfigurationError, PortInUseError, UnavailableError, UnschedulableError
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.weights import CheckpointFiles

OBJECT_STORE_BYTES = 100 << 20
POLL_SECONDS = 0.1
# Until all pipelines are attached; longer on a cluster that may have to add nodes for them.
READY_SECONDS, NODES_SECONDS = 180.0, 900.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Deployment:
    """What a Serve config file deploys."""

    schema: ServeDeploySchema
    name: str
    config: ClusterConfig


# What is served when no Serve config file is given.
DEFAULT_DEPLOYMENT = {
    "proxy_location": "Disabled",
    "applications": [{"name": "pyramidserve", "import_path": "cluster.app:build", "route_prefix": None}],
}


def read_deployment(path: Path | None) -> Deployment:
    """Reads a Serve config file with one application of ours; None: the default deployment.

    Raises ConfigurationError.
    """
    try:
        raw: Any = DEFAULT_DEPLOYMENT if path is None else yaml.safe_load(path.read_text())
        schema = ServeDeploySchema.model_validate(raw)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigurationError(f"{path} is not a Serve config file: {error}") from error
    if len(schema.applications) != 1:
        raise ConfigurationError(f"{path} has {len(schema.applications)} applications; give one")
    application = schema.applications[0]
    return Deployment(schema, application.name, parse_config(application.args))


def quiet() -> None:
    """Keeps Ray's and Serve's own messages out of the terminal; they are in the session's log files."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


@contextmanager
def serving(deployment: Deployment, address: str, progress: Progress) -> Iterator[str]:
    """Deploys, and yields the router's address once a pipeline is attached; ends it all at the end.

    Args:
        address: of a Ray cluster that is there; "" starts one on this machine.

    Raises UnschedulableError when this machine lacks a resource that the shards need,
    ConfigurationError when there is no such cluster or the deployment fails.
    """
    check(deployment.config, progress)
    if address:
        join(address, progress)
    else:
        check_port(deployment.config)
        _start(deployment.config, progress)
    try:
        with _deployed(deployment, NODES_SECONDS if address else READY_SECONDS, progress) as target:
            yield target
    finally:
        ray.shutdown()


def check(config: ClusterConfig, progress: Progress) -> None:
    """Looks at all files that the deployment needs, so that what is wrong shows before anything starts.

    Raises CheckpointError or ConfigurationError.
    """
    quiet()
    read_tenants(config.tenants_file)
    server_credentials(config.tls_certificate, config.tls_key)
    check_model(config, progress)


def join(address: str, progress: Progress) -> None:
    """Connects this process to a Ray cluster. Raises ConfigurationError if there is none."""
    progress(f"joining the Ray cluster at {address}")
    # As Ray does by itself for "auto" alone.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigurationError(f"there is no Ray cluster at {address!r}: {error}") from error


def ray_address() -> str:
    """Of the Ray cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def _start(config: ClusterConfig, progress: Progress) -> None:
    progress("starting a local Ray cluster")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        resources={ROUTER_RESOURCE: 1},
        # Ray would have shards give way to whatever else runs.
        _system_config={"worker_niceness": 0},
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        check_resources(config)
    except UnschedulableError:
        ray.shutdown()
        raise


@contextmanager
def _deployed(deployment: Deployment, patience: float, progress: Progress) -> Iterator[str]:
    config = deployment.config
    serve.start(proxy_location=ProxyLocation.Disabled)
    progress(f"deploying {config.pipelines} pipeline(s) of {config.shards} shard(s)")
    deploy(deployment.schema)
    try:
        await_running(deployment.name, patience)
        await_pipelines(config, patience)
        yield router_target(config)
    finally:
        progress("shutting down")
        # Lets the replicas go in order; the rest of Serve ends with the cluster.
        serve.delete(deployment.name)


def deploy(schema: ServeDeploySchema) -> None:
    """Does what the dashboard does with a config file: the public calls restart gangs on every change."""
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)


def check_model(config: ClusterConfig, progress: Progress) -> None:
    """Makes the checkpoint ready. Raises CheckpointError or ConfigurationError before anything starts."""
    checkpoint = resolve_checkpoint(config.model, progress)
    shard_settings(config, read_config(checkpoint))
    CheckpointFiles(checkpoint)


def check_port(config: ClusterConfig) -> None:
    """Raises PortInUseError when the router could not listen."""
    problem = port_problem(config.router_host, config.router_port)
    if problem is not None:
        raise PortInUseError(
            f"cannot listen on {config.router_host}:{config.router_port}: {problem}; "
            "stop the process that listens there or choose another router_port"
        )


def check_resources(config: ClusterConfig) -> None:
    """Raises UnschedulableError, naming the resource that the cluster lacks."""
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, wanted in demand(config).items():
        if wanted > there.get(resource, 0):
            raise UnschedulableError(
                f"the shards need {wanted:g} {resource}, the cluster has {there.get(resource, 0):g}; "
                f"lower pipelines ({config.pipelines}), shards ({config.shards}) or what each shard "
                "reserves, or add nodes"
            )


def await_running(name: str, patience: float) -> None:
    """Waits ``patience`` seconds until the application runs.

    Raises ConfigurationError when it fails or takes longer.
    """
    deadline = time.monotonic() + patience
    message = ""
    while time.monotonic() < deadline:
        overview = serve.status().applications.get(name)
        if overview is not None:
            details = [d.message for d in overview.deployments.values() if d.message]
            message = "; ".join([overview.message, *details]).strip("; ")
            if overview.status == ApplicationStatus.RUNNING:
                return
            if overview.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise ConfigurationError(f"the deployment failed: {message}")
        time.sleep(POLL_SECONDS)
    raise ConfigurationError(f"the deployment was not ready after {patience:g} s: {message}")


def router_target(config: ClusterConfig) -> str:
    """Where the router listens."""
    return f"{config.router_host}:{config.router_port}"


def own_client(config: ClusterConfig) -> Client:
    """A client that the cluster's own settings let in."""
    certificate = Path(config.tls_certificate).read_bytes() if config.tls_certificate else None
    return Client(router_target(config), token=first_token(config.tenants_file), certificate=certificate)


def await_pipelines(config: ClusterConfig, patience: float) -> None:
    """Waits ``patience`` seconds until the router answers and has all its pipelines attached.

    Raises ConfigurationError when that takes longer.
    """
    deadline = time.monotonic() + patience
    with own_client(config) as client:
        while time.monotonic() < deadline:
            try:
                if len(client.cluster_state().pipelines) >= config.pipelines:
                    return
            except UnavailableError:
                pass
            time.sleep(POLL_SECONDS)
    raise ConfigurationError(
        f"no pipeline attached to the router at {router_target(config)} in {patience:g} s"
    )
