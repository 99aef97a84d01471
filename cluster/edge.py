"""The Serve deployment that hosts the router."""

import asyncio
import logging
from typing import Any

from cluster.config import ClusterConfig
from cluster.requests import ValidatedRequest, validate_request
from cluster.router import Router
from cluster.server import RouterServer, serve
from pyramidserve import MAX_MESSAGE_BYTES
from pyramidserve.v1 import inference_pb2 as messages
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.tokenizer import Tokenizer
from workers.rendezvous import announce

logger = logging.getLogger("ray.serve")


class Edge:
    """Listens for clients and pipelines, and announces where."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, router_key: str, shards: Any
    ) -> None:
        """``shards`` is the handle of the shards' deployment; it makes them part of the application."""
        self._server: RouterServer | None = None
        checkpoint = await asyncio.to_thread(resolve_checkpoint, config.model)
        model = read_config(checkpoint)
        tokenizer = await asyncio.to_thread(Tokenizer, checkpoint)

        def validate(request: messages.GenerateRequest) -> ValidatedRequest:
            return validate_request(request, tokenizer, model, config.compression)

        router = Router(
            config.model,
            queue_limit=config.queue_limit,
            session_limit=config.session_limit,
            session_max_age=config.session_max_age,
        )
        self._grace = config.drain_seconds
        self._server = await serve(
            router,
            validate,
            host=config.router_host,
            port=config.router_port,
            max_message_bytes=MAX_MESSAGE_BYTES,
            bind_timeout=config.bind_seconds,
        )
        await asyncio.to_thread(
            announce, router_key, {"host": config.router_host, "port": self._server.port}
        )

    async def __del__(self) -> None:
        if self._server is not None:
            await self._server.stop(self._grace)
