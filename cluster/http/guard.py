"""What browsers are kept from: calling from pages of others, and being told that we are another host."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http.errors import response_of
from pyramidserve.errors import InvalidRequestError, PyramidServeError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# What pages of ours may do, wherever they are shown.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PREFLIGHT_SECONDS = 600


class Guard:
    """Refuses requests of pages that are not ours, and on the loopback those for other hosts."""

    def __init__(self, app: ASGIApp, host: str, origins: Sequence[str]) -> None:
        """``origins``: of pages that may call too, as in "https://chat.example"; "*": all.

        A proxy on this machine may call by their hosts.
        """
        self._app, self._origins = app, frozenset(origins)
        own = {*LOOPBACK, *(urlsplit(each).hostname for each in origins)}
        self._hosts = own if host in LOOPBACK and "*" not in origins else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is not refused."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        try:
            self._check(origin, host)
        except PyramidServeError as error:
            await response_of(error)(scope, receive, send)
            return
        crosses = origin if origin and urlsplit(origin).netloc != host else None
        if crosses and scope["method"] == "OPTIONS":
            await _allowed(headers)(scope, receive, _with_headers(send, crosses))
            return
        await self._app(scope, receive, _with_headers(send, crosses))

    def _check(self, origin: str | None, host: str) -> None:
        name = urlsplit(f"//{host}").hostname if host else None
        if self._hosts is not None and name not in self._hosts:
            raise InvalidRequestError(
                f"the request is for host {host!r:.80}, and this listens on the loopback alone; call it "
                "by 127.0.0.1 or localhost, or have the origin of a proxy before it in cors_origins",
                reason="origin_refused",
            )
        if origin is None or urlsplit(origin).netloc == host or self._origins & {origin, "*"}:
            return
        raise InvalidRequestError(
            f"pages of {origin!r:.80} may not call this; cors_origins has those that may",
            reason="origin_refused",
        )


def _allowed(headers: Headers) -> Response:
    """The answer to a browser that asks before it calls."""
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
            "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
        },
    )


def _with_headers(send: Send, crosses: str | None) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            if crosses:
                headers["Access-Control-Allow-Origin"] = crosses
                headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
                headers.add_vary_header("Origin")
        await send(message)

    return sent
