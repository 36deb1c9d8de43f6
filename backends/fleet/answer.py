"""What came back over HTTP, and the reading of its error bodies.

Servers describe an error in five shapes (vLLM, the FIRST gateway and proxies between):
``{"error": {"code", "message", "type", "param"}}``, ``{"error": "text"}``,
``{"detail": "text" or list}``, HTML, and plain text.
"""

from __future__ import annotations

import email.utils
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import orjson

from ..core.secrets import MASKED
from ..core.values import read_json
from .address import NO_KEY

_PREVIEW: Final = 200
"""Characters of a body that a message may quote."""
_KEY_HEADERS: Final = ("Authorization", "Proxy-Authorization")
_SHORTEST_KEY: Final = 4


class RawAnswer(Exception):  # noqa: N818 - an answer that travels as a cause, not an error's name
    """The HTTP answer behind an endpoint's error: its ``__cause__``.

    Args:
        status: HTTP status.
        headers: Headers, names in lower case.
        body: The body as it came.
        sent: The headers of the request, whose keys ``masked`` removes.
    """

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        sent: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, headers, body)
        self._sent = sent
        self.status = status
        self.headers = headers
        self.body = body

    def masked(self) -> RawAnswer:
        """Return the answer without the keys of the request, which some servers quote in errors."""
        keys = sent_keys(self._sent)
        if not keys:
            return self
        try:
            body = orjson.dumps(read_json(self.body))  # undoes escapes that could hide a key
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            body = self.body
        if (masked := _without(body, keys)) == body:
            masked = _without(self.body, keys)
        return RawAnswer(self.status, self.headers, masked)

    def __str__(self) -> str:
        """Return status and the body's beginning; headers may hold cookies."""
        return f"HTTP {self.status}: {preview(self.body)}"


@dataclass(frozen=True, slots=True)
class Complaint:
    """An error body in one shape.

    Attributes:
        message: The server's words, shortened.
        code: Its error code or type, or None.
        param: The request's field at fault, or None.
        html: Whether the body is a web page: a proxy or a wrong URL answered.
    """

    message: str
    code: str | None = None
    type: str | None = None
    param: str | None = None
    html: bool = False

    @classmethod
    def read(cls, body: bytes) -> Complaint:
        """Read an error body in any of the five shapes."""
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            return cls(preview(body), html=body.lstrip()[:1] == b"<")
        return cls.of(document)

    @classmethod
    def of(cls, document: Any) -> Complaint:
        """Read a decoded error body."""
        if isinstance(document, dict) and (inner := document.get("error")):
            if isinstance(inner, dict):
                return cls(
                    preview(inner.get("message") or inner),
                    _text(inner.get("code")),
                    _text(inner.get("type")),
                    _text(inner.get("param")),
                )
            return cls(preview(inner))
        if isinstance(document, dict) and "detail" in document:
            return cls(preview(document["detail"]), _text(document.get("code")))
        if isinstance(document, dict) and document.get("object") == "error":
            # vLLM before 0.9 and the streams of the FIRST gateway put the error at the top.
            return cls(
                preview(document.get("message") or document),
                _text(document.get("code")),
                _text(document.get("type")),
                _text(document.get("param")),
            )
        return cls(preview(document))


def sent_keys(headers: Mapping[str, str] | None) -> list[str]:
    """Return the keys that the headers of a request hold, none that is too short to be secret."""
    values = (headers.get(name, "") for name in _KEY_HEADERS) if headers else ()
    keys = (value.partition(" ")[2].strip() or value for value in values)
    return [key for key in keys if len(key) >= _SHORTEST_KEY and key != NO_KEY]


def without_keys(text: str, headers: Mapping[str, str] | None) -> str:
    """Return a text without the keys that the headers of a request hold."""
    keys = sent_keys(headers)
    return _without(text.encode(errors="replace"), keys).decode() if keys else text


def _without(body: bytes, keys: Iterable[str]) -> bytes:
    for key in keys:
        forms = (key, orjson.dumps(key).decode()[1:-1], html.escape(key), quote(key, safe=""))
        for form in sorted(dict.fromkeys((*forms, quote(key))), key=len, reverse=True):
            body = body.replace(form.encode(), MASKED.encode())
    return body


def preview(value: Any) -> str:
    """Return a value's text on one line, cut to a length fit for messages."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    line = " ".join(text.split())
    return line if len(line) <= _PREVIEW else line[:_PREVIEW] + "…"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3), or None."""
    if milliseconds := headers.get("retry-after-ms"):
        return _seconds(milliseconds, 1000.0)
    value = headers.get("retry-after")
    if value is None:
        return None
    if (seconds := _seconds(value, 1.0)) is not None:
        return seconds
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _seconds(text: str, per_second: float) -> float | None:
    try:
        seconds = float(text) / per_second
    except ValueError:
        return None
    # A header is foreign text: "nan" and "-1" parse as numbers too.
    return seconds if 0.0 <= seconds < float("inf") else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


class BodyTooLargeError(aiohttp.ClientPayloadError):
    """An answer has more bytes than may be read of it."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the answer is larger than {most:,} bytes")
        self.most = most


class ProxyError(aiohttp.ClientConnectionError):
    """A proxy variable of the environment does not name an HTTP proxy."""
