"""Heads of requests are bounded, in bytes and in time."""

import asyncio
import socket

import pytest
from served_router import Site, run, site

from cluster.http import protocol
from cluster.http.protocol import MOST_HEAD_BYTES
from cluster.http.server import bind

ASKS = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LINE = b"X-More: " + b"x" * 1014 + b"\r\n"


async def connected(at: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with at.http() as client:  # it listens
        await client.get("/version")
    return await asyncio.open_connection("127.0.0.1", at.server.http_ports[0])


@pytest.mark.parametrize("more", [LINE, b"x" * 1024])
def test_a_head_without_end_is_refused(more: bytes) -> None:
    async def scenario() -> None:
        async with site() as at:
            reader, writer = await connected(at)
            writer.write(ASKS + b"X-Long: ")
            sent = 0
            while not reader.at_eof() and sent < 4 * MOST_HEAD_BYTES:
                writer.write(more)
                sent += len(more)
                try:
                    await writer.drain()
                    said = await asyncio.wait_for(reader.read(100), 0.001)
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
                assert said.startswith(b"HTTP/1.1 400")
                break
            assert MOST_HEAD_BYTES <= sent < 4 * MOST_HEAD_BYTES
            writer.close()

    run(scenario)


def test_long_heads_and_longer_bodies_are_read_on_one_connection() -> None:
    async def scenario() -> None:
        async with site() as at:
            reader, writer = await connected(at)
            body = b'{"prompt": "' + b"x" * 90_000 + b'"}'
            for _ in range(3):
                writer.write(ASKS.replace(b"GET /health", b"POST /tokenize") + 40 * LINE)
                writer.write(
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                (length,) = (
                    int(each.split()[1])
                    for each in head.lower().split(b"\r\n")
                    if b"content-length" in each
                )
                assert b'"count":90001' in (await reader.readexactly(length)).replace(b" ", b"")
            writer.close()

    run(scenario)


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.05)

    async def scenario() -> None:
        async with site() as at:
            for begun in (b"", ASKS):
                reader, writer = await connected(at)
                writer.write(begun)
                assert await asyncio.wait_for(reader.read(), 20) == b""
                writer.close()

    run(scenario)


def test_what_is_written_is_sent_at_once() -> None:
    async def scenario() -> None:
        options: list[int] = []

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(met, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await reader.read() == b""
            writer.close()
        assert options == [1]

    run(scenario)
