"""What a Serve config file deploys, and whether all that it needs is there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.app import shard_settings
from cluster.config import ClusterConfig, parse_config
from cluster.edge.server import port_problem, server_credentials
from cluster.edge.tenants import read_tenants
from pyramidserve.errors import ConfigurationError, PortInUseError
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.weights import open_weights

Progress = Callable[[str], None]

# What is served when no Serve config file is given.
DEFAULT_DEPLOYMENT = {
    "proxy_location": "Disabled",
    "applications": [{"name": "pyramidserve", "import_path": "cluster.app:build", "route_prefix": None}],
}


@dataclass(frozen=True)
class Deployment:
    """What a Serve config file deploys."""

    schema: ServeDeploySchema
    name: str
    config: ClusterConfig


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


def check_files(config: ClusterConfig, progress: Progress) -> None:
    """Looks at all files that a deployment needs, so that what is wrong shows before anything starts.

    Makes the checkpoint ready. Raises CheckpointError or ConfigurationError.
    """
    read_tenants(config.tenants_file)
    server_credentials(config.tls_certificate, config.tls_key)
    checkpoint = resolve_checkpoint(config.model, progress)
    model = read_config(checkpoint, config.max_model_len)
    progress(f"{config.model} has {model.summary}")
    shard_settings(config, model)
    open_weights(checkpoint, model)


def check_port(config: ClusterConfig) -> None:
    """Raises PortInUseError when the router could not listen."""
    problem = port_problem(config.router_host, config.router_port)
    if problem is not None:
        raise PortInUseError(
            f"cannot listen on {config.router_host}:{config.router_port}: {problem}; "
            "stop the process that listens there or choose another router_port"
        )
