"""Request heads and chunked bodies of HTTP/1.1 (RFC 9112)."""

from __future__ import annotations

from dataclasses import dataclass


class BadFramingError(ValueError):
    """Bytes that are no HTTP request."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's line and the headers that matter here.

    Attributes:
        method: ``GET``, ``POST``, …
        path: The path, without the query.
        query: The query, without ``?``.
        raw: All header lines, as received.
        lower: The same in lower case, for searching.
        length: The body's bytes, 0 when chunked.
        chunked: Whether the body is chunked.
        keep_alive: Whether the connection stays open afterwards.
        expects_continue: Whether the client waits for ``100 Continue``.
    """

    method: str
    path: str
    query: str
    raw: bytes
    lower: bytes
    length: int
    chunked: bool
    keep_alive: bool
    expects_continue: bool

    def header(self, name: bytes) -> str | None:
        """Return a header's value.

        Args:
            name: The header's name in lower case.

        Returns:
            The value, or None.
        """
        span = _span(self.lower, name)
        return None if span is None else self.raw[span[0] : span[1]].strip().decode("latin-1")


def parse_head(data: bytes) -> Head:
    """Read a request's head.

    Args:
        data: Everything before the empty line.

    Returns:
        The head.

    Raises:
        BadFramingError: It is none.
    """
    line, _, raw = data.partition(b"\r\n")
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):  # noqa: PLR2004 - RFC 9112, 3
        raise BadFramingError("no request line")
    lower = b"\r\n" + raw.lower()
    raw = b"\r\n" + raw
    path, _, query = parts[1].decode("latin-1").partition("?")
    length = _value(lower, b"content-length") or b"0"
    if not length.isdigit():
        raise BadFramingError("content-length is no number")
    connection = _value(lower, b"connection") or b""
    return Head(
        method=parts[0].decode("latin-1"),
        path=path,
        query=query,
        raw=raw,
        lower=lower,
        length=int(length),
        chunked=_value(lower, b"transfer-encoding") == b"chunked",
        keep_alive=connection == b"keep-alive"
        if parts[2] == b"HTTP/1.0"
        else connection != b"close",
        expects_continue=_value(lower, b"expect") == b"100-continue",
    )


def _span(lower: bytes, name: bytes) -> tuple[int, int] | None:
    start = lower.find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    end = lower.find(b"\r\n", start)
    return start, len(lower) if end < 0 else end


def _value(lower: bytes, name: bytes) -> bytes | None:
    span = _span(lower, name)
    return None if span is None else lower[span[0] : span[1]].strip()


def chunked_body(buffer: bytearray) -> bytes | None:
    """Take a chunked body off the front of a buffer, once it is whole.

    Args:
        buffer: What was received after the head; shortened by the body.

    Returns:
        The body, or None while some of it is missing.

    Raises:
        BadFramingError: A chunk's size is no number.
    """
    body, place = bytearray(), 0
    while (line_end := buffer.find(b"\r\n", place)) >= 0:
        size = _chunk_size(bytes(buffer[place:line_end]))
        start, end = line_end + 2, line_end + 2 + size
        if len(buffer) < end + 2:
            return None
        if size == 0:
            del buffer[: end + 2]
            return bytes(body)
        body += buffer[start:end]
        place = end + 2
    return None


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.split(b";")[0], 16)
    except ValueError:
        raise BadFramingError("a chunk's size is no number") from None
