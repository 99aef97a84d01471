"""What we use of Ray that is not its public interface: what an upgrade of Ray may break is here."""

import logging
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import find_gcs_addresses
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

# Of `ray.init`, as its _system_config: Ray would have shards give way to whatever else runs.
SYSTEM_CONFIG = {"worker_niceness": 0}


def put(key: str, value: bytes) -> None:
    """Writes to the cluster's key-value store."""
    _internal_kv_put(key.encode(), value)


def get(key: str) -> bytes | None:
    """What the cluster's key-value store has under ``key``."""
    value: bytes | None = _internal_kv_get(key.encode())
    return value


def delete(key: str) -> None:
    """Takes ``key`` out of the cluster's key-value store, if it is there."""
    _internal_kv_del(key.encode())


def clusters_here() -> frozenset[str]:
    """The addresses of the Ray clusters that have a node on this machine."""
    return frozenset(find_gcs_addresses())  # type: ignore[no-untyped-call]


def use_token() -> None:
    """Lets this process authenticate itself if it has a token, as Ray does by itself for "auto" alone."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def deploy(schema: ServeDeploySchema) -> None:
    """Does what the dashboard does with a config file: the public calls restart gangs on every change."""
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)


def deployed() -> tuple[dict[str, Any], dict[str, ServeApplicationSchema]]:
    """What Serve says of itself, and the configs that it keeps; nothing where it does not run.

    The configs may be of applications that have gone.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}, {}
    return client.get_serve_details(), ray.get(client._controller.get_app_configs.remote())


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
