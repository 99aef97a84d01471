"""Heads of requests, of which uvicorn would take any number of bytes and wait for them for ever."""

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A head that is too long is refused; one that does not come ends it."""

    _head_bytes = 0
    _in_head = True
    _late: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._unset()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads more of a request."""
        # What ends a head, or a body, has more behind it; what does neither is of the head alone.
        self._head_bytes += len(data) if self._in_head else 0
        super().data_received(data)
        if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of the request has more than {MOST_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if self._late is None:
            self._wait()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._unset()
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unset(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
