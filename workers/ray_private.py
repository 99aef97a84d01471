"""What we use of Ray that is not its public interface: what an upgrade of Ray may break is here."""

import logging
import os
from contextlib import suppress
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import find_gcs_addresses
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve._private.common import GANG_PG_NAME_PREFIX
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema
from ray.util import get_placement_group, placement_group_table, remove_placement_group

from pyramidserve.errors import ConfigurationError

# Of `ray.init`, as its _system_config: Ray would have shards give way to whatever else runs.
SYSTEM_CONFIG = {"worker_niceness": 0}
ANSWER_SECONDS = 5.0


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


def use_token_as(address: str) -> None:
    """Lets this process authenticate itself by the token it has if the cluster at ``address`` wants one.

    Ray does so by itself for "auto" alone, whether one is wanted or not; but a process that has tokens on
    takes no answers from a cluster that has not. Raises ConfigurationError where RAY_AUTH_MODE says so.
    """
    if _wants_token(address):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    elif os.environ.get("RAY_AUTH_MODE") == "token":
        raise ConfigurationError(
            f"RAY_AUTH_MODE is 'token', but the Ray cluster at {address!r} has no token authentication and "
            "its answers would not be taken; leave RAY_AUTH_MODE out, or start the cluster with it"
        )


def _wants_token(address: str) -> bool:
    """Asks what `ray health-check` does, without a token; True also where nobody answers."""
    with grpc.insecure_channel(address) as channel:
        alive: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=ANSWER_SECONDS)
        except grpc.RpcError:
            return True
    return False


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


def empty_gangs(application: str) -> frozenset[str]:
    """Placement groups of an application's gangs of shards without an actor, now or to come."""
    gang = f"{GANG_PG_NAME_PREFIX}{application}_Shard_"
    groups = {
        identity: group["name"]
        for identity, group in placement_group_table().items()
        if group["name"].startswith(gang) and group["state"] == "CREATED"
    }
    accessor = state._connect_and_get_accessor()
    taken = {
        ActorTableData.FromString(actor).placement_group_id.hex()
        for living in ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING")
        for actor in accessor.get_actor_table(None, living)
    }
    return frozenset(name for identity, name in groups.items() if identity not in taken)


def remove_gang(name: str) -> None:
    """Removes the placement group of that name, unless Serve has done so."""
    with suppress(ValueError):
        remove_placement_group(get_placement_group(name))


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
