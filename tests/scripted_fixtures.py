"""Fixtures around a scripted Inference service."""

import io
import socket
import sys
from collections.abc import Callable, Iterator

import pytest
from scripted_inference import ScriptedInference, serving

from pyramidserve import Client


@pytest.fixture
def scripted() -> ScriptedInference:
    """A service that echoes unless the test gives it another script."""
    return ScriptedInference()


@pytest.fixture
def scripted_target(scripted: ScriptedInference) -> Iterator[str]:
    """Where ``scripted`` is served, as "host:port"."""
    with serving(scripted) as target:
        yield target


@pytest.fixture
def client(scripted_target: str) -> Iterator[Client]:
    """A client of ``scripted``."""
    with Client(scripted_target) as client:
        yield client


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Types lines at the terminal, and then the end of the file."""
    return lambda lines: monkeypatch.setattr(sys, "stdin", io.StringIO(lines))


@pytest.fixture
def deaf_target() -> Iterator[str]:
    """A "host:port" that refuses connections, and is nobody else's meanwhile."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unheard.getsockname()[1]}"
