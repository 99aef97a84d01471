"""The HTTP server beside the gRPC one, in the same event loop."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from cluster.http.protocol import BoundedProtocol

# Idle connections are kept for clients that come back.
KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's own affair."""
        yield


class HttpServer:
    """Listens until it is stopped."""

    def __init__(self, app: ASGIApp, listener: socket.socket, certificate: str, key: str) -> None:
        """Serves ``app`` on a socket that is bound; ``start`` begins it."""
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="none",
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                ssl_certfile=certificate or None,
                ssl_keyfile=key or None,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to listen, in the running event loop."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))

    def leave(self) -> None:
        """Listens no more, and lets what runs go on; those who call now reach who takes over."""
        for each in self._server.servers:
            each.close()
        self._server.should_exit = True

    async def stop(self, grace: float) -> None:
        """Ends what still runs after ``grace`` seconds."""
        assert self._serving is not None
        self.leave()
        await asyncio.wait([self._serving], timeout=grace)
        self._server.force_exit = True
        for task in self._server.server_state.tasks:
            task.cancel()
        await self._serving


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, also beside one that is to be taken over. Raises OSError."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    # asyncio sends at once where the protocol is named, and else waits 40 ms for a client's word.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
