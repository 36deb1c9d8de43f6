"""A small HTTP/1.1 server: keep-alive, one request at a time per connection, no framework.

RFC 9112 as far as clients of a model server use it: request bodies with ``Content-Length`` or
chunked, ``Expect: 100-continue``, ``Connection: close``, chunked answers for streams; and, on
purpose, the misbehaviour that a broken server shows.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, MutableSet
from http import HTTPStatus
from typing import Final, TypeAlias, cast
from urllib.parse import parse_qs

from .framing import BadFramingError, Head, chunked_body, parse_head

_MOST_HEAD: Final = 64 * 1024
_MOST_BODY: Final = 64 * 1024 * 1024
JSON: Final = b"application/json"
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


class Exchange:
    """One request and its answer.

    Attributes:
        head: The request's line and headers.
        body: The request's body.
        on_lost: Called once if the client leaves before the answer is complete.
    """

    __slots__ = ("_connection", "body", "head", "on_lost")

    def __init__(self, connection: Connection, head: Head, body: bytes) -> None:
        self._connection: Connection | None = connection
        self.head = head
        self.body = body
        self.on_lost: Callable[[], None] | None = None

    @property
    def open(self) -> bool:
        """Whether the answer is not complete and the client is still there."""
        return self._connection is not None

    def query(self, name: str) -> str | None:
        """Return a query parameter, or None."""
        values = parse_qs(self.head.query).get(name)
        return values[0] if values else None

    def set_idle(self, seconds: float | None) -> None:
        """Set after how long the connection is closed when it idles afterwards.

        Args:
            seconds: Seconds, or None for never.
        """
        if self._connection is not None:
            self._connection.idle_s = seconds

    def reply(
        self, body: bytes, status: int = 200, content_type: bytes = JSON, extra: bytes = b""
    ) -> None:
        """Answer at once and completely.

        Args:
            body: The body.
            status: HTTP status.
            content_type: Value of ``Content-Type``.
            extra: More header lines, each ending in CRLF.
        """
        self._send(_head(status, content_type, extra, len(body)) + body)
        self._finish()

    def begin(self) -> None:
        """Start a stream of server-sent events."""
        kind = b"text/event-stream; charset=utf-8"
        self._send(_head(200, kind, b"transfer-encoding: chunked\r\n", None))

    def write(self, data: bytes) -> None:
        """Send a part of the stream.

        Args:
            data: Some bytes, not empty.
        """
        self._send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """End the stream properly."""
        self._send(b"0\r\n\r\n")
        self._finish()

    def cut(self, body: bytes) -> None:
        """Promise more than is sent, then close.

        Args:
            body: What would be the whole body; half of it is sent.
        """
        self._send(_head(200, JSON, b"", len(body)) + body[: len(body) // 2])
        self.drop()

    def drop(self) -> None:
        """Close the connection without an answer (FIN)."""
        self._release().close()

    def reset(self) -> None:
        """Break the connection without an answer (RST)."""
        self._release().reset()

    def lost(self) -> None:
        """Note that the client left."""
        self._connection = None
        if self.on_lost is not None:
            self.on_lost()

    def _send(self, data: bytes) -> None:
        if self._connection is not None:
            self._connection.send(data)

    def _release(self) -> Connection:
        connection, self._connection = self._connection, None
        if connection is None:
            raise RuntimeError("the exchange is over")
        connection.exchange = None
        return connection

    def _finish(self) -> None:
        if self._connection is not None:
            self._release().done(self.head.keep_alive)


Handler: TypeAlias = Callable[[Exchange], None]


class Connection(asyncio.Protocol):
    """One connection of one client.

    Args:
        handler: Gets each request; answers at once or later.
        connections: Where the connection is listed while it is open.
    """

    def __init__(self, handler: Handler, connections: MutableSet[Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._head: Head | None = None
        self._idle: asyncio.TimerHandle | None = None
        self.exchange: Exchange | None = None
        self.idle_s: float | None = None
        """Seconds after which an idle connection is closed, or None."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport; see `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Tell the exchange under way, if any; see `asyncio.Protocol`."""
        self._connections.discard(self)
        self._stop_idling()
        exchange, self.exchange, self._transport = self.exchange, None, None
        if exchange is not None:
            exchange.lost()

    def data_received(self, data: bytes) -> None:
        """Collect bytes and serve whole requests; see `asyncio.Protocol`."""
        self._stop_idling()
        self._buffer += data
        if len(self._buffer) > _MOST_BODY + _MOST_HEAD:
            self._refuse(413)
        elif self.exchange is None:
            self._serve()

    def _serve(self) -> None:
        while self.exchange is None and self._usable():
            try:
                body = self._next_body()
            except BadFramingError:
                self._refuse(400)
                return
            if body is None or self._head is None:
                return
            head, self._head = self._head, None
            self.exchange = Exchange(self, head, body)
            self._handler(self.exchange)

    def _usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def _next_body(self) -> bytes | None:
        """Return the next request's body once it is whole; its head is then in ``_head``."""
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _MOST_HEAD:
                    raise BadFramingError("the head is too long")
                return None
            self._head = parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if self._head.expects_continue:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._head.chunked:
            return chunked_body(self._buffer)
        length = self._head.length
        if len(self._buffer) < length:
            return None
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return body

    def send(self, data: bytes) -> None:
        """Send bytes, unless the client left."""
        if self._transport is not None:
            self._transport.write(data)

    def done(self, keep: bool) -> None:
        """End one exchange.

        Args:
            keep: Whether the connection stays open for the next one.
        """
        if not keep:
            self.close()
            return
        if self.idle_s is not None:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self.idle_s, self.close)
        if self._buffer:
            asyncio.get_running_loop().call_soon(self._serve)

    def close(self) -> None:
        """Close after what is written has gone out."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Break the connection, so that the client sees a reset."""
        if self._transport is None:
            return
        sock: socket.socket = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _refuse(self, status: int) -> None:
        self._buffer.clear()
        self.send(_head(status, b"text/plain", b"connection: close\r\n", 0))
        self.close()


def _head(status: int, content_type: bytes, extra: bytes, length: int | None) -> bytes:
    size = b"" if length is None else b"content-length: %d\r\n" % length
    return b"HTTP/1.1 %d %b\r\nserver: fanfold-simulated\r\n%bcontent-type: %b\r\n%b\r\n" % (
        status,
        _REASONS[status],
        size,
        content_type,
        extra,
    )
