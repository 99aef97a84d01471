"""A router that is served to clients, by gRPC and HTTP, with heads that tests script."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from fake_head import PATIENCE, FakeHead, hello, until
from httpx2 import AsyncClient as AsyncClientOfHttp
from letters import FACTS, AnyGrammar, Letters
from openai import AsyncOpenAI

from cluster.admit.request import ValidatedRequest
from cluster.edge.server import Http, RouterServer, serve
from cluster.front.front import Front
from cluster.front.tenants import Tenants
from cluster.front.validation import validate_request
from cluster.http.app import Api
from cluster.http.guard import Guard
from cluster.http.metrics import metrics_app
from cluster.http.served import Served
from cluster.http.text import Text
from cluster.route.router import Router
from pyramidserve import AsyncClient, AsyncReplyStream
from pyramidserve.types import Compression, Event, Sampling, Stopping
from pyramidserve.v1 import pipeline_pb2
from pyramidserve.v1.inference_pb2 import GenerateRequest
from workers.model.transcript import Transcript

MAX_MESSAGE_BYTES = 100_000
LONG = Stopping(max_tokens=112)  # seven of a stage's eight pages
GREEDY = Sampling(seed=7)
ORIGINS = ("https://chat.example",)  # of other pages that may call
NOBODY = Tenants({})  # everybody is the same tenant


@dataclass(frozen=True)
class Site:
    """A served router and a client of it."""

    router: Router
    front: Front
    server: RouterServer
    client: AsyncClient
    target: str

    def head(self, introduction: pipeline_pb2.Hello | None = None) -> FakeHead:
        return FakeHead(f"127.0.0.1:{self.server.registry_port}", introduction or hello())

    def stream(self, request_id: str = "r", **options: object) -> AsyncReplyStream:
        """A request for sixteen tokens."""
        settings = {"sampling": GREEDY, "stopping": Stopping(max_tokens=16), **options}
        return self.client.stream([1], request_id=request_id, **settings)  # type: ignore[arg-type]

    def reserved(self) -> list[int]:
        """Pages promised in each stage of the only pipeline."""
        (pipeline,) = self.router.state().pipelines
        return [stage.pages_reserved for stage in pipeline.stages]

    def openai(self, token: str = "any", retries: int = 0) -> Any:
        """OpenAI's own client, which must be closed."""
        url = f"http://127.0.0.1:{self.server.http_ports[0]}/v1"
        return AsyncOpenAI(base_url=url, api_key=token, timeout=PATIENCE, max_retries=retries)

    def http(self, **headers: str) -> AsyncClientOfHttp:
        """A plain client, which must be closed."""
        url = f"http://127.0.0.1:{self.server.http_ports[0]}"
        return AsyncClientOfHttp(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)

    async def emptied(self) -> None:
        """Waits until nothing is queued or running."""
        await until(lambda: not self.router.state().queued and not self.router.state().running)
        self.router.check_integrity()


@asynccontextmanager
async def site(
    queue_limit: int = 4, tenants: Tenants = NOBODY, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[Site]:
    router = Router("toy", queue_limit=queue_limit, session_limit=8, session_max_age=60)

    def validate(request: GenerateRequest, last: Transcript | None) -> ValidatedRequest:
        return validate_request(
            *(request, last, Letters(), FACTS, Compression("full"), AnyGrammar()),
            kv_dtype=router.kv_dtype or "bfloat16",
        )

    front = Front(router, validate, tenants)
    served = Served("toy", FACTS.context, 1_764_000_000, FACTS.layers)
    api = Api(front, Text(Letters(), FACTS.vocabulary), served, MAX_MESSAGE_BYTES)
    app = Guard(api.application(), "127.0.0.1", ORIGINS)
    server = await serve(
        router,
        front,
        port=0,
        credentials=credentials,
        http=(Http(app, 0), Http(metrics_app(router.metrics.text), 0)),
        max_message_bytes=MAX_MESSAGE_BYTES,
        bind_timeout=0,
    )
    target = f"127.0.0.1:{server.port}"
    try:
        async with AsyncClient(target, timeout=PATIENCE) as client:
            yield Site(router, front, server, client, target)
    finally:
        await server.stop(0)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


async def events_of(stream: AsyncReplyStream) -> list[Event]:
    return [event async for event in stream]
