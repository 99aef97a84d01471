"""Options of gRPC's channels and servers: how large messages may be, when a silent peer counts as gone."""

from dataclasses import dataclass
from typing import TypeAlias

Options: TypeAlias = list[tuple[str, int]]

MAX_MESSAGE_BYTES = 8 * 2**20
UNLIMITED = -1
# Peers that ask more often than this whether a server is there are sent away.
LEAST_PING_MILLISECONDS = 500


@dataclass(frozen=True)
class Patience:
    """Milliseconds of silence after which a peer is asked whether it is there, and may take to answer."""

    silence: int
    answer: int


CLIENT = Patience(5_000, 10_000)
# Longer, so that a client that comes back finds its reply still running.
SERVER = Patience(10_000, 20_000)


def channel_options(max_message_bytes: int) -> Options:
    """Of a client's channel; messages have at most so many bytes, either way."""
    return _options(max_message_bytes, CLIENT)


def server_options(max_message_bytes: int) -> Options:
    """Of a server; messages have at most so many bytes, either way."""
    least = ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_MILLISECONDS)
    return [*_options(max_message_bytes, SERVER), least]


def endpoint(host: str, port: int) -> str:
    """``host`` and ``port`` as gRPC wants them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _options(max_message_bytes: int, patience: Patience) -> Options:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", patience.silence),
        ("grpc.keepalive_timeout_ms", patience.answer),
        # Of the same question: without it gRPC waits for a minute, whatever the line above says.
        ("grpc.http2.ping_timeout_ms", patience.answer),
        # While nothing is asked, too: what lies between may forget a connection that is silent.
        ("grpc.keepalive_permit_without_calls", 1),
        # A stream may be silent for as long as its prompt takes.
        ("grpc.http2.max_pings_without_data", 0),
    ]
