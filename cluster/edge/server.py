"""The gRPC server in front of a router."""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server
from starlette.types import ASGIApp

from cluster.edge.servicer import INFERENCE, Inference, PipelineRegistry, Reflection
from cluster.front.front import Front
from cluster.http.server import HttpServer, bind
from cluster.route.router import Router
from pyramidserve.errors import ConfigurationError, PortInUseError
from pyramidserve.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from pyramidserve.v1.pipeline_pb2_grpc import add_PipelineRegistryServicer_to_server
from pyramidserve.wire.connection import UNLIMITED, endpoint, server_options
from workers.events import tell

BIND_INTERVAL = 0.2
# What is still open when the router has drained is aborted after so long.
ABORT_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Http:
    """What is served by HTTP, on ``port``; with the PEM files of ``certificate`` and ``key``, by TLS."""

    app: ASGIApp
    port: int
    certificate: str = ""
    key: str = ""


class RouterServer:
    """A listening router: ``port`` is for clients, ``registry_port`` for the heads of pipelines.

    ``http_ports`` are for HTTP, of each ``Http`` that it was to serve.
    """

    def __init__(
        self,
        router: Router,
        servers: tuple[grpc.aio.Server, grpc.aio.Server],
        ports: tuple[int, int],
        health: health.aio.HealthServicer,
        http: tuple[HttpServer, ...],
    ) -> None:
        self.port, self.registry_port = ports
        self.http_ports = tuple(each.port for each in http)
        self._http = http
        self._router = router
        self._servers = servers
        self._health = health

    async def stop(self, grace: float) -> None:
        """Drains the router for ``grace`` seconds, lets its pipelines go and stops listening."""
        await self._health.enter_graceful_shutdown()
        public, internal = self._servers
        # Those who call from now on connect anew, to the router that takes over if there is one.
        leaving = asyncio.create_task(public.stop(grace + ABORT_SECONDS))
        for each in self._http:
            each.leave()
        await self._router.drain(grace)
        for each in self._http:
            await each.stop(ABORT_SECONDS)
        await public.stop(ABORT_SECONDS)
        await leaving
        await internal.stop(ABORT_SECONDS)


async def serve(
    router: Router,
    front: Front,
    *,
    host: str = "127.0.0.1",
    port: int,
    credentials: grpc.ServerCredentials | None = None,
    http: tuple[Http, ...] = (),
    registry_host: str = "127.0.0.1",
    max_message_bytes: int,
    bind_timeout: float,
    tell_where: Callable[[int], None] | None = None,
    beside_pipelines: int = 0,
) -> RouterServer:
    """Serves ``router`` to clients on one port, with health and reflection, and to pipelines on another.

    Args:
        router: what is served.
        front: its front, which clients call.
        host: the interface to listen on; only this machine unless given.
        port: 0 takes any free one.
        credentials: for TLS towards clients.
        http: each served on a port of its own beside that.
        registry_host: the interface for pipelines, which are trusted.
        max_message_bytes: bytes that one message may have, either way.
        bind_timeout: seconds to wait for a port that is in use, as by the server to be replaced.
        tell_where: called in another thread with the port for pipelines.
        beside_pipelines: takes over from a server on the same port: listens to clients beside it, once
            so many pipelines are there. 0: the port must be its own.

    Raises:
        PortInUseError: the port did not become free.
    """
    # So that another may take over; that the port is free is looked at before.
    options = [("grpc.so_reuseport", 1), *server_options(max_message_bytes)]
    public = grpc.aio.server(options=options)
    internal = grpc.aio.server(options=server_options(UNLIMITED))
    health_servicer = health.aio.HealthServicer()
    registry = PipelineRegistry(router, health_servicer)
    await registry.publish_health()
    add_InferenceServicer_to_server(Inference(front), public)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, public)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    add_ServerReflectionServicer_to_server(Reflection(front, (INFERENCE, health_name)), public)
    add_PipelineRegistryServicer_to_server(registry, internal)
    inside = internal.add_insecure_port(endpoint(registry_host, 0))
    await internal.start()
    if tell_where is not None:
        await asyncio.to_thread(tell_where, inside)
    if beside_pipelines:
        await _attached(router, beside_pipelines)
    else:
        await _free(host, port, bind_timeout)
        for each in http:
            await _free(host, each.port, bind_timeout)
    address = endpoint(host, port)
    if credentials is None:
        bound = public.add_insecure_port(address)
    else:
        bound = public.add_secure_port(address, credentials)
    await public.start()
    listening = []
    for each in http:
        listening.append(HttpServer(each.app, bind(host, each.port), each.certificate, each.key))
        listening[-1].start()
    ports = {"port": bound, "registry_port": inside, "http_ports": [each.port for each in listening]}
    tell(log, logging.INFO, "router_listening", host=host, tls=bool(credentials), **ports)
    return RouterServer(router, (public, internal), (bound, inside), health_servicer, tuple(listening))


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


async def _attached(router: Router, pipelines: int) -> None:
    while len(router.state().pipelines) < pipelines:
        await asyncio.sleep(BIND_INTERVAL)


async def _free(host: str, port: int, timeout: float) -> None:
    """Waits until nobody listens there. Raises PortInUseError."""
    deadline = asyncio.get_running_loop().time() + timeout
    while (problem := port_problem(host, port)) is not None:
        if asyncio.get_running_loop().time() >= deadline:
            raise PortInUseError(
                f"cannot listen on {host}:{port} after {timeout:g} s: {problem}; another process listens "
                "there, or the host is not of this machine; stop the other process or choose another port"
            )
        await asyncio.sleep(BIND_INTERVAL)


def port_problem(host: str, port: int) -> str | None:
    """Why this process cannot have a port for itself; None if it can."""
    try:
        (family, kind, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
