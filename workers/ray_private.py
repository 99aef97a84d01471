"""What we use of Ray that is not its public interface: what an upgrade of Ray may break is here."""

import logging
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

# Of `ray.init`, as its _system_config: Ray would have shards give way to whatever else runs.
SYSTEM_CONFIG = {"worker_niceness": 0}


def put(key: str, value: bytes) -> None:
    """Writes to the cluster's key-value store."""
    _internal_kv_put(key.encode(), value)


def get(key: str) -> bytes | None:
    """What the cluster's key-value store has under ``key``."""
    value: bytes | None = _internal_kv_get(key.encode())
    return value


def use_token() -> None:
    """Lets this process authenticate itself if it has a token, as Ray does by itself for "auto" alone."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def deploy(schema: ServeDeploySchema) -> None:
    """Does what the dashboard does with a config file: the public calls restart gangs on every change."""
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)


def deployed() -> list[dict[str, Any]]:
    """The config of each application, as it was deployed; none where Serve does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return []
    applications = client.get_serve_details()["applications"].values()
    return [application["deployed_app_config"] for application in applications]


def serve_log() -> RotatingFileHandler:
    """What writes the log that Serve keeps of this replica."""
    (buffer,) = (
        each for each in logging.getLogger("ray.serve").handlers if isinstance(each, MemoryHandler)
    )
    assert isinstance(buffer.target, RotatingFileHandler)
    return buffer.target


def serve_logs() -> Path | None:
    """The folder of Serve's logs on this node; None while this process has not joined a cluster."""
    return Path(get_serve_logs_dir()) if ray.is_initialized() else None
