"""What faults put on the wire."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Final

import orjson

from .errors import error_body
from .rules import IN_STREAM, FaultRule
from .server import JSON, Exchange

_HTML: Final = b"text/html"
_TEXT: Final = b"text/plain; charset=utf-8"
_PAGE: Final = b"<html><head><title>%b</title></head><body><h1>%b</h1></body></html>\n"


def _gateway(code: str, message: str, **info: Any) -> bytes:
    """Encode an error of the FIRST gateway."""
    return orjson.dumps({"error": {"code": code, "message": message, "info": info}})


def _too_many(rule: FaultRule) -> bytes:
    if rule.shape == "first":
        return b'{"detail":"Too many requests."}'
    return error_body("Rate limit exceeded, please slow down.", "Too Many Requests", 429)


def _retry_after(rule: FaultRule) -> bytes:
    seconds = 1.0 if rule.value is None else rule.value
    if not rule.http_date:
        return b"retry-after: %d\r\n" % seconds
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return f"retry-after: {format_datetime(moment, usegmt=True)}\r\n".encode()


_PLAIN: Final[dict[str, tuple[int, bytes, bytes]]] = {
    "500": (500, JSON, error_body("Simulated engine failure.", "InternalServerError", 500)),
    "500_text": (500, _TEXT, b"Internal Server Error"),
    "502_html": (502, _HTML, _PAGE % (b"502 Bad Gateway", b"502 Bad Gateway")),
    "503": (503, JSON, error_body("Simulated failure.", "ServiceUnavailableError", 503)),
    "503_busy": (
        503,
        JSON,
        error_body(
            "The engine is currently busy and cannot accept new requests. Please try again later.",
            "Service Unavailable",
            503,
        ),
    ),
    "504": (
        504,
        JSON,
        _gateway("internal_endpoint_error", "Error: the endpoint did not answer.", timeout=120),
    ),
    "cold": (
        503,
        JSON,
        _gateway(
            "internal_endpoint_error",
            "Error: Endpoint simulated online but not ready to receive tasks. "
            "Please try again later.",
        ),
    ),
    "tpm": (
        429,
        JSON,
        _gateway(
            "too_many_requests",
            "Error: Too many tokens per minute.",
            global_model_usage="exceeded",
            user_model_usage="exceeded",
        ),
    ),
    "401_after": (
        401,
        JSON,
        _gateway("unauthorized", "Error: Token is expired or has been revoked."),
    ),
}

REFUSED_BY: Final = frozenset([*_PLAIN, "429", "429_ra", "drop", "reset", "hang"])
"""Faults that need no answer of the model."""


def refuse(exchange: Exchange, rule: FaultRule) -> None:
    """Treat a request as a fault demands that strikes before any work is done.

    Args:
        exchange: The request.
        rule: The fault; its kind is one of `REFUSED_BY`.
    """
    match rule.kind:
        case "429":
            exchange.reply(_too_many(rule), 429)
        case "429_ra":
            exchange.reply(_too_many(rule), 429, extra=_retry_after(rule))
        case "drop":
            exchange.drop()
        case "reset":
            exchange.reset()
        case "hang":
            pass  # the exchange stays open until the client leaves
        case kind:
            status, content_type, body = _PLAIN[kind]
            exchange.reply(body, status, content_type)


def unauthorized(exchange: Exchange) -> None:
    """Refuse a wrong key as vLLM does: here ``error`` is a string.

    Args:
        exchange: The request.
    """
    exchange.reply(b'{"error":"Unauthorized"}', 401)


def distort(exchange: Exchange, body: dict[str, Any], kind: str) -> None:
    """Send a complete answer with something wrong about it.

    Args:
        exchange: The request.
        body: The good answer.
        kind: The fault.
    """
    match kind:
        case "malformed":
            whole = orjson.dumps(body)
            exchange.reply(whole[: len(whole) // 2])
        case "cut_body":
            exchange.cut(orjson.dumps(body))
        case "html200":
            exchange.reply(_PAGE % (b"Sign in", b"Please sign in"), content_type=_HTML)
        case "error200":
            exchange.reply(error_body("Simulated engine failure.", "InternalServerError", 500))
        case "null_choices":
            exchange.reply(orjson.dumps({**body, "choices": None}))
        case "empty_choices":
            exchange.reply(orjson.dumps({**body, "choices": []}))
        case "no_usage":
            exchange.reply(orjson.dumps({**body, "usage": None}))
        case _:
            exchange.reply(orjson.dumps(body))


DISTORTIONS: Final = frozenset(
    ["malformed", "cut_body", "html200", "error200", "null_choices", "empty_choices"]
)
"""Faults that replace a stream by one body."""

BROKEN: Final = DISTORTIONS | IN_STREAM
"""Faults that leave an answer that was paid and cannot be read."""
