"""The page that Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def metrics_app(text: Callable[[], bytes]) -> Starlette:
    """An application with /metrics alone."""

    async def metrics(request: Request) -> Response:
        return Response(text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return Starlette(routes=[Route("/metrics", metrics)])
