"""The gRPC server in front of a router."""

import asyncio
import logging
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.requests import ValidatedRequest
from cluster.router import Router
from cluster.servicer import INFERENCE, REGISTRY, Inference, PipelineRegistry
from pyramidserve.errors import PortInUseError
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from pyramidserve.v1.pipeline_pb2_grpc import add_PipelineRegistryServicer_to_server

BIND_INTERVAL = 0.2
KEEPALIVE_MILLISECONDS = 10_000

log = logging.getLogger(__name__)


class RouterServer:
    """A listening server; ``port`` is the one it got."""

    def __init__(
        self, port: int, router: Router, server: grpc.aio.Server, health: health.aio.HealthServicer
    ) -> None:
        self.port = port
        self._router = router
        self._server = server
        self._health = health

    async def stop(self, grace: float) -> None:
        """Drains the router for ``grace`` seconds, lets its pipelines go and stops listening."""
        await self._health.enter_graceful_shutdown()
        await self._router.drain(grace)
        await self._server.stop(1.0)


async def serve(
    router: Router,
    validate: Callable[[pb.GenerateRequest], ValidatedRequest],
    *,
    host: str = "127.0.0.1",
    port: int,
    max_message_bytes: int,
    bind_timeout: float,
) -> RouterServer:
    """Serves ``router`` to clients and pipelines on one port, with health and reflection.

    Args:
        router: what is served.
        validate: checks a request; called in another thread.
        host: the interface to listen on; only this machine unless given.
        port: 0 takes any free one.
        max_message_bytes: bytes that one message may have, either way.
        bind_timeout: seconds to wait for a port that is in use, as by the server to be replaced.

    Raises:
        PortInUseError: the port did not become free.
    """
    server = grpc.aio.server(
        options=[
            # Else a second server could share the port unseen.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MILLISECONDS),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MILLISECONDS // 2),
        ]
    )
    health_servicer = health.aio.HealthServicer()
    registry = PipelineRegistry(router, health_servicer)
    await registry.publish_health()
    add_InferenceServicer_to_server(Inference(router, validate), server)
    add_PipelineRegistryServicer_to_server(registry, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((INFERENCE, REGISTRY, health_name, reflection.SERVICE_NAME), server)
    bound = await _bind(server, f"{host}:{port}", bind_timeout)
    await server.start()
    log.info("router_listening host=%s port=%d", host, bound)
    return RouterServer(bound, router, server, health_servicer)


async def _bind(server: grpc.aio.Server, address: str, timeout: float) -> int:
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        try:
            return server.add_insecure_port(address)
        except RuntimeError as error:
            if asyncio.get_running_loop().time() >= deadline:
                raise PortInUseError(
                    f"cannot listen on {address} after {timeout:g} s: another process listens "
                    "there, or the host is not of this machine; stop the other process or choose "
                    "another port"
                ) from error
        await asyncio.sleep(BIND_INTERVAL)
