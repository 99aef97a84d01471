"""The Serve deployment that hosts the router."""

import asyncio
import time
from typing import Any

from ray import serve as serve_api

from cluster.admit.request import ValidatedRequest
from cluster.config import ClusterConfig
from cluster.edge.leftovers import clear_leftovers
from cluster.edge.server import Http, RouterServer, serve, server_credentials
from cluster.front.front import Front
from cluster.front.tenants import read_tenants
from cluster.front.validation import validate_request
from cluster.http.app import Api
from cluster.http.guard import Guard
from cluster.http.metrics import metrics_app
from cluster.http.served import Served
from cluster.http.text import Text
from cluster.route.router import Router
from pyramidserve import MAX_MESSAGE_BYTES
from pyramidserve.types import ClusterState, Sampling
from pyramidserve.v1 import inference_pb2 as messages
from workers import ray_private
from workers.budget.kv_format import stored
from workers.event_file import write_events
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import ModelConfig, read_config
from workers.model.generation import sampling_defaults
from workers.model.grammar import Grammars
from workers.model.tokenizer import Tokenizer, end_ids
from workers.model.transcript import Transcript
from workers.policies.measured import use_budgets, use_gates
from workers.policies.registry import enable, versions
from workers.rendezvous import announce, node_address, router_key, shard_address, take_over_key

DEMAND_SECONDS = 0.5
EVERY_INTERFACE = ("", "0.0.0.0", "::", "[::]")


class Edge:
    """Listens for clients and pipelines, and announces where."""

    async def __init__(self, config: ClusterConfig, shards: Any) -> None:  # type: ignore[misc]
        """``shards`` is the handle of the shards' deployment; it makes them part of the application."""
        write_events()
        enable(config.policies)
        use_budgets(config.budgets)
        use_gates(config.gates)
        self._server: RouterServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        checkpoint = await asyncio.to_thread(resolve_checkpoint, config.model)
        model = read_config(checkpoint, config.max_model_len)
        tokenizer = await asyncio.to_thread(Tokenizer, checkpoint, config.control_tokens_in_messages)

        sampling = sampling_defaults(checkpoint) if config.defaults == "model" else Sampling()
        grammars = Grammars(tokenizer, model.vocabulary, end_ids(model, tokenizer))

        def validate(request: messages.GenerateRequest, last: Transcript | None) -> ValidatedRequest:
            kv_dtype = router.kv_dtype or stored(config.kv_dtype, config.dtype)
            return validate_request(
                *(request, last, tokenizer, model, config.compression, grammars, sampling), kv_dtype
            )

        tenants = read_tenants(config.tenants_file)
        router = Router(
            config.model,
            weights=tenants.weights,
            policies=versions(config.policies, model.fingerprint),
            admit=config.admit,
            route=config.route,
            queue_limit=config.queue_limit,
            session_limit=config.session_limit,
            session_max_age=config.session_max_age,
        )
        front = Front(router, validate, tenants)
        self._grace = config.drain_seconds
        registry_host = shard_address(config.shard_host)

        def tell_where(port: int) -> None:
            announce(router_key(), {"host": registry_host, "port": port})

        application = serve_api.get_replica_context().app_name
        takes_over = await asyncio.to_thread(ray_private.get, take_over_key(application)) is not None
        self._router, self._host = router, config.router_host
        self._server = await serve(
            router,
            front,
            host=config.router_host,
            port=config.router_port,
            credentials=server_credentials(config.tls_certificate, config.tls_key),
            http=_http(router, front, config, tokenizer, model),
            registry_host=registry_host,
            max_message_bytes=MAX_MESSAGE_BYTES,
            bind_timeout=config.bind_seconds,
            tell_where=tell_where,
            beside_pipelines=config.pipelines if takes_over else 0,
        )
        if config.max_pipelines:
            self._tasks.append(asyncio.create_task(_tell_demand(router)))
        if config.shards > 1:
            self._tasks.append(asyncio.create_task(clear_leftovers(application)))

    async def pipelines_and_address(self) -> tuple[int, str]:
        """How many pipelines are attached, and where clients find the router."""
        assert self._server is not None
        host = node_address() if self._host in EVERY_INTERFACE else self._host
        return len(self._router.state().pipelines), f"{host}:{self._server.port}"

    async def state(self) -> ClusterState:
        """As the router sees it."""
        return self._router.state()

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(self._grace)


def _http(
    router: Router, front: Front, config: ClusterConfig, tokenizer: Tokenizer, model: ModelConfig
) -> tuple[Http, ...]:
    """OpenAI's API over ``front``, for browsers and programs; and what Prometheus reads."""
    name = config.served_model_name or config.model
    served = Served(name, model.context, int(time.time()), model.layers)
    api = Api(front, Text(tokenizer, model.vocabulary), served, MAX_MESSAGE_BYTES)
    app = Guard(api.application(), config.router_host, config.cors_origins)
    files = config.tls_certificate, config.tls_key
    both = (
        Http(app, config.http_port, *files),
        Http(metrics_app(router.metrics.text), config.metrics_port, *files),
    )
    return tuple(each for each in both if each.port)


async def _tell_demand(router: Router) -> None:
    while True:
        router.tell_demand()
        await asyncio.sleep(DEMAND_SECONDS)
