"""A way to a server that a test can close without a word, as a lost machine or a forgetful router does."""

import asyncio
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Way:
    """Forwards connections to a server.

    Attributes:
        target: where it listens, as "host:port".
        connections: pairs of sockets, of which it still carries what comes.
    """

    target: str
    connections: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)
    _lost: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)

    def swallow(self) -> None:
        """All connections that there are stay open, and carry nothing any more; new ones do."""
        self._lost += self.connections
        self.connections.clear()

    async def connected(self) -> None:
        """Waits until it carries a connection."""
        while not self.connections:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        for pair in (*self.connections, *self._lost):
            for end in pair:
                end.close()


@contextmanager
def way_to(target: str) -> Iterator[Way]:
    """Listens on loopback and forwards to ``target``, "host:port"."""
    host, port = target.rsplit(":", 1)
    listening, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()
    way = Way(f"127.0.0.1:{listening.getsockname()[1]}")

    def forward() -> None:
        while not ended.is_set():
            pairs = list(way.connections)
            others = {one: other for a, b in pairs for one, other in ((a, b), (b, a))}
            for readable in select.select([listening, *others], [], [], 0.05)[0]:
                if readable is listening:
                    server = socket.create_connection((host, int(port)))
                    way.connections.append((listening.accept()[0], server))
                elif data := _received(readable):
                    others[readable].sendall(data)
                else:
                    way.connections = [pair for pair in way.connections if readable not in pair]
                    others[readable].close()
                    readable.close()

    forwarding = threading.Thread(target=forward, name="way")
    forwarding.start()
    try:
        yield way
    finally:
        ended.set()
        forwarding.join()
        way.close()
        listening.close()


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(1 << 16)
    except OSError:
        return b""
