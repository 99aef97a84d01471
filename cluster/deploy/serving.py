"""Serves a deployment, on a Ray cluster of its own or on one that is there."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation

from cluster.app import ROUTER_RESOURCE
from cluster.config import ClusterConfig
from cluster.deploy import deployed
from cluster.deploy.checks import check_files, check_memory, check_port, check_resources
from cluster.deploy.deployment import Deployment, Progress
from cluster.deploy.readiness import await_ready
from pyramidserve.errors import ConfigurationError
from workers import ray_private
from workers.rendezvous import mark_own_cluster

OBJECT_STORE_BYTES = 100 << 20
# Until all pipelines are attached; longer on a cluster that may have to add nodes for them.
READY_SECONDS, NODES_SECONDS = 180.0, 900.0
# For a deployment that goes to be gone, beside what it may drain.
GONE_SECONDS = 60.0


@contextmanager
def serving(deployment: Deployment, address: str, progress: Progress) -> Iterator[str]:
    """Deploys, and yields the router's address once all pipelines are attached; ends it all at the end.

    Args:
        address: of a Ray cluster that is there; "" starts one on this machine.

    Raises UnschedulableError when this machine lacks a resource that the shards need,
    ConfigurationError when there is no such cluster, the application's name is taken there, or the
    deployment fails.
    """
    if not address:
        check_files(deployment.config, progress)
        check_memory(deployment.config)
        check_port(deployment.config)
    with (
        joined(address, progress) if address else _started(deployment.config, progress),
        _deployed(deployment, NODES_SECONDS if address else READY_SECONDS, progress) as target,
    ):
        yield target


@contextmanager
def joined(address: str, progress: Progress) -> Iterator[None]:
    """Connects this process to a Ray cluster; "auto": the only one on this machine.

    Raises ConfigurationError if there is none, more than one, or it does not let this process in.
    """
    address = the_only_one() if address == "auto" else address
    _quiet()
    progress(f"joining the Ray cluster at {address}")
    ray_private.use_token_as(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigurationError(
            f"the Ray cluster at {address!r} cannot be joined: {error}; give the --address of one that "
            "runs, and RAY_AUTH_MODE=token with its RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH if it wants one"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def the_only_one() -> str:
    """The address of the Ray cluster on this machine, or of RAY_ADDRESS.

    Raises ConfigurationError when there is none, or more than one.
    """
    if given := os.environ.get("RAY_ADDRESS", ""):
        return given
    found = sorted(ray_private.clusters_here())
    if len(found) != 1:
        there = (
            f"several Ray clusters run on this machine: {', '.join(found)}" if found else "none runs here"
        )
        raise ConfigurationError(f"which Ray cluster is meant? {there}; give its --address")
    return found[0]


def ray_address() -> str:
    """Of the Ray cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def _quiet() -> None:
    """Keeps Ray's and Serve's own messages out of the terminal; they are in the session's log files."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


@contextmanager
def _started(config: ClusterConfig, progress: Progress) -> Iterator[None]:
    progress("starting a local Ray cluster")
    _quiet()
    try:
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
        check_resources(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
        yield
    finally:
        ray.shutdown()


@contextmanager
def _deployed(deployment: Deployment, patience: float, progress: Progress) -> Iterator[str]:
    config, application = deployment.config, deployed.application_of(deployment)
    name = application.name
    serve.start(proxy_location=ProxyLocation.Disabled)
    deployed.check_place(deployed.look(), name, config)
    deployed.await_gone(name, GONE_SECONDS + config.drain_seconds)  # as a command before may have left it
    progress(f"deploying {config.pipelines} pipeline(s) of {config.shards} shard(s)")
    try:
        deployed.put(application)
        yield await_ready(name, config, patience)
    finally:
        progress("shutting down")
        deployed.take_away(name)
        deployed.await_gone(name, GONE_SECONDS + config.drain_seconds)
