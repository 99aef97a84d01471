"""Serves a deployment, on a Ray cluster of its own or on one that is there."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus

from cluster.app import ROUTER_RESOURCE, demand
from cluster.config import ClusterConfig
from cluster.deploy.deployment import Deployment, Progress, check_files, check_port
from cluster.edge.tenants import first_token
from pyramidserve import Client
from pyramidserve.errors import ConfigurationError, UnavailableError, UnschedulableError
from workers import ray_private
from workers.rendezvous import mark_own_cluster

OBJECT_STORE_BYTES = 100 << 20
POLL_SECONDS = 0.1
# Until all pipelines are attached; longer on a cluster that may have to add nodes for them.
READY_SECONDS, NODES_SECONDS = 180.0, 900.0


@contextmanager
def serving(deployment: Deployment, address: str, progress: Progress) -> Iterator[str]:
    """Deploys, and yields the router's address once a pipeline is attached; ends it all at the end.

    Args:
        address: of a Ray cluster that is there; "" starts one on this machine.

    Raises UnschedulableError when this machine lacks a resource that the shards need,
    ConfigurationError when there is no such cluster or the deployment fails.
    """
    check_files(deployment.config, progress)
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


def join(address: str, progress: Progress) -> None:
    """Connects this process to a Ray cluster. Raises ConfigurationError if there is none."""
    _quiet()
    progress(f"joining the Ray cluster at {address}")
    ray_private.use_token()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigurationError(f"there is no Ray cluster at {address!r}: {error}") from error


def ray_address() -> str:
    """Of the Ray cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def _quiet() -> None:
    """Keeps Ray's and Serve's own messages out of the terminal; they are in the session's log files."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _start(config: ClusterConfig, progress: Progress) -> None:
    progress("starting a local Ray cluster")
    _quiet()
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        resources={ROUTER_RESOURCE: 1},
        _system_config=ray_private.SYSTEM_CONFIG,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    mark_own_cluster()
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
    ray_private.deploy(deployment.schema)
    try:
        await_running(deployment.name, patience)
        await_pipelines(config, patience)
        yield router_target(config)
    finally:
        progress("shutting down")
        # Lets the replicas go in order; the rest of Serve ends with the cluster.
        serve.delete(deployment.name)


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
