"""The gRPC server in front of a router."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.requests import ValidatedRequest
from cluster.router import Router
from cluster.servicer import INFERENCE, Inference, PipelineRegistry
from cluster.tenants import Tenants
from pyramidserve.errors import ConfigurationError, PortInUseError
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from pyramidserve.v1.pipeline_pb2_grpc import add_PipelineRegistryServicer_to_server
from workers.model.transcript import Transcript

BIND_INTERVAL = 0.2
KEEPALIVE_MILLISECONDS = 10_000

log = logging.getLogger(__name__)


class RouterServer:
    """A listening router: ``port`` is for clients, ``registry_port`` for the heads of pipelines."""

    def __init__(
        self,
        router: Router,
        servers: tuple[grpc.aio.Server, grpc.aio.Server],
        ports: tuple[int, int],
        health: health.aio.HealthServicer,
    ) -> None:
        self.port, self.registry_port = ports
        self._router = router
        self._servers = servers
        self._health = health

    async def stop(self, grace: float) -> None:
        """Drains the router for ``grace`` seconds, lets its pipelines go and stops listening."""
        await self._health.enter_graceful_shutdown()
        await self._router.drain(grace)
        for server in self._servers:
            await server.stop(1.0)


async def serve(
    router: Router,
    validate: Callable[[pb.GenerateRequest, Transcript | None], ValidatedRequest],
    tenants: Tenants,
    *,
    host: str = "127.0.0.1",
    port: int,
    credentials: grpc.ServerCredentials | None = None,
    registry_host: str = "127.0.0.1",
    max_message_bytes: int,
    bind_timeout: float,
) -> RouterServer:
    """Serves ``router`` to clients on one port, with health and reflection, and to pipelines on another.

    Args:
        router: what is served.
        validate: checks a request; called in another thread.
        tenants: who may call.
        host: the interface to listen on; only this machine unless given.
        port: 0 takes any free one.
        credentials: for TLS towards clients.
        registry_host: the interface for pipelines, which are trusted.
        max_message_bytes: bytes that one message may have, either way.
        bind_timeout: seconds to wait for a port that is in use, as by the server to be replaced.

    Raises:
        PortInUseError: the port did not become free.
    """
    options = [
        # Else a second server could share the port unseen.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MILLISECONDS // 2),
    ]
    public, internal = grpc.aio.server(options=options), grpc.aio.server(options=options)
    health_servicer = health.aio.HealthServicer()
    registry = PipelineRegistry(router, health_servicer)
    await registry.publish_health()
    add_InferenceServicer_to_server(Inference(router, validate, tenants), public)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, public)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((INFERENCE, health_name, reflection.SERVICE_NAME), public)
    add_PipelineRegistryServicer_to_server(registry, internal)
    bound = await _bind(public, f"{host}:{port}", credentials, bind_timeout)
    inside = await _bind(internal, f"{registry_host}:0", None, bind_timeout)
    for server in (public, internal):
        await server.start()
    log.info(
        "router_listening host=%s port=%d tls=%s registry_port=%d", host, bound, bool(credentials), inside
    )
    return RouterServer(router, (public, internal), (bound, inside), health_servicer)


def server_credentials(certificate: str, key: str) -> grpc.ServerCredentials | None:
    """For TLS with these PEM files, or none where there are none. Raises ConfigurationError."""
    if not certificate and not key:
        return None
    try:
        pair = Path(key).read_bytes(), Path(certificate).read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"tls_certificate {certificate!r} and tls_key {key!r} cannot be read, give both as PEM: {error}"
        ) from error
    return grpc.ssl_server_credentials([pair])


async def _bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, timeout: float
) -> int:
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            if asyncio.get_running_loop().time() >= deadline:
                raise PortInUseError(
                    f"cannot listen on {address} after {timeout:g} s: another process listens "
                    "there, or the host is not of this machine; stop the other process or choose "
                    "another port"
                ) from error
        await asyncio.sleep(BIND_INTERVAL)
