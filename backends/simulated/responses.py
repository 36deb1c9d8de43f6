"""Bodies of correct, broken and refused answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Final

import orjson

from ..core.types import SIMULATED_FINGERPRINT
from .faults import IN_STREAM, FaultRule
from .responders import Answer
from .server import JSON_TYPE, Exchange
from .spec import UsageMode
from .values import error_body, truncate_tokens

DONE: Final = b"data: [DONE]\n\n"
_FIRST_TOKENS: Final = 1
_BURST: Final = 8
"""Tokens per chunk of a stream."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Metadata of an answer.

    Attributes:
        id: The answer's id.
        created: Unix time in seconds.
        model: The model's name.
        chat: Whether it answers a chat completion.
        usage: The usage object, or None where the server omits it or sends null.
        omit_usage: Whether the key ``usage`` is omitted.
    """

    id: str
    created: int
    model: str
    chat: bool
    usage: dict[str, Any] | None
    omit_usage: bool = False


def usage_object(mode: UsageMode, prompt: int, completion: int) -> dict[str, Any] | None:
    """Return the five keys of ``usage``, or None in the modes ``null`` and ``omit``."""
    if mode in {"null", "omit"}:
        return None
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": 0} if mode == "details" else None,
        "completion_tokens_details": None,
    }


def completion_body(envelope: Envelope, answer: Answer) -> dict[str, Any]:
    """Return the body of a complete answer."""
    choice = _chat_choice(envelope, answer) if envelope.chat else _text_choice(answer)
    body = {
        "id": envelope.id,
        "object": "chat.completion" if envelope.chat else "text_completion",
        "created": envelope.created,
        "model": envelope.model,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": SIMULATED_FINGERPRINT,
        "usage": envelope.usage,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }
    if envelope.omit_usage:
        del body["usage"]
    return body


def _text_choice(answer: Answer) -> dict[str, Any]:
    return {
        "index": 0,
        "text": answer.text,
        "logprobs": None,
        "finish_reason": answer.finish_reason,
        "stop_reason": None,
        "token_ids": None,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
    }


def _chat_choice(envelope: Envelope, answer: Answer) -> dict[str, Any]:
    calls = [_tool_call(envelope, answer)] if answer.tool else []
    return {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None if calls or answer.refusal else answer.text,
            "refusal": answer.refusal,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": calls,
            "reasoning": None,
        },
        "logprobs": _logprobs(answer),
        "finish_reason": answer.finish_reason,
        "stop_reason": None,
        "token_ids": None,
    }


def _logprobs(answer: Answer) -> dict[str, Any] | None:
    if answer.logprobs is None or answer.refusal is not None:
        return None
    content = [
        {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
        for token, value in answer.logprobs
    ]
    return {"content": content}


def _tool_call(envelope: Envelope, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-tool-{envelope.id[-16:]}",
        "type": "function",
        "function": {"name": answer.tool, "arguments": answer.text},
    }


def encode_event(data: Any) -> bytes:
    """Encode one server-sent event with JSON data."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def stream_start(envelope: Envelope, answer: Answer) -> bytes:
    """Return a stream's first events: the role and the first token."""
    first = truncate_tokens(answer.text, _FIRST_TOKENS)
    if not envelope.chat:
        return encode_event(_chunk(envelope, {"text": first}))
    role = encode_event(_chunk(envelope, {"delta": {"role": "assistant", "content": ""}}))
    return role + encode_event(_chunk(envelope, _delta(envelope, answer, first, named=True)))


def stream_middle(envelope: Envelope, answer: Answer) -> bytes:
    """Return a stream's events between the first token and the finish."""
    rest, events = answer.text[len(truncate_tokens(answer.text, _FIRST_TOKENS)) :], []
    while rest:
        burst = truncate_tokens(rest, _BURST)
        rest = rest[len(burst) :]
        delta = _delta(envelope, answer, burst) if envelope.chat else {"text": burst}
        events.append(encode_event(_chunk(envelope, delta)))
    return b"".join(events)


def stream_end(envelope: Envelope, answer: Answer, include_usage: bool) -> bytes:
    """Return a stream's last events: the finish, the requested usage, and ``[DONE]``."""
    empty: dict[str, Any] = {"delta": {}} if envelope.chat else {"text": ""}
    finish = encode_event(_chunk(envelope, empty, answer.finish_reason))
    if not include_usage or envelope.omit_usage:
        return finish + DONE
    last = {**_chunk(envelope, empty), "choices": [], "usage": envelope.usage}
    return finish + encode_event(last) + DONE


def _delta(envelope: Envelope, answer: Answer, part: str, named: bool = False) -> dict[str, Any]:
    if answer.refusal is not None:
        return {"delta": {"refusal": answer.refusal}}
    if answer.tool is None:
        return {"delta": {"content": part}}
    call: dict[str, Any] = {"index": 0, "function": {"arguments": part}}
    if named:
        call = {**_tool_call(envelope, answer), **call}
        call["function"] = {"name": answer.tool, "arguments": part}
    return {"delta": {"tool_calls": [call]}}


def _chunk(
    envelope: Envelope, content: dict[str, Any], finish_reason: str | None = None
) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "object": "chat.completion.chunk" if envelope.chat else "text_completion",
        "created": envelope.created,
        "model": envelope.model,
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}],
        "system_fingerprint": SIMULATED_FINGERPRINT,
    }


_HTML: Final = b"text/html"
_TEXT: Final = b"text/plain; charset=utf-8"
_PAGE: Final = b"<html><head><title>%b</title></head><body><h1>%b</h1></body></html>\n"


def _gateway(code: str, message: str, **info: Any) -> bytes:
    """Encode an error of the FIRST gateway."""
    return orjson.dumps({"error": {"code": code, "message": message, "info": info}})


def _rate_limit_body(rule: FaultRule) -> bytes:
    if rule.shape == "first":
        return b'{"detail":"Too many requests."}'
    return error_body("Rate limit exceeded, please slow down.", "Too Many Requests", 429)


def _retry_after(rule: FaultRule) -> bytes:
    seconds = 1.0 if rule.value is None else rule.value
    if not rule.http_date:
        return b"retry-after: %d\r\n" % seconds
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return f"retry-after: {format_datetime(moment, usegmt=True)}\r\n".encode()


_ERROR_REPLIES: Final[dict[str, tuple[int, bytes, bytes]]] = {
    "500": (500, JSON_TYPE, error_body("Simulated engine failure.", "InternalServerError", 500)),
    "500_text": (500, _TEXT, b"Internal Server Error"),
    "502_html": (502, _HTML, _PAGE % (b"502 Bad Gateway", b"502 Bad Gateway")),
    "503": (503, JSON_TYPE, error_body("Simulated failure.", "ServiceUnavailableError", 503)),
    "503_busy": (
        503,
        JSON_TYPE,
        error_body(
            "The engine is currently busy and cannot accept new requests. Please try again later.",
            "Service Unavailable",
            503,
        ),
    ),
    "504": (
        504,
        JSON_TYPE,
        _gateway("internal_endpoint_error", "Error: the endpoint did not answer.", timeout=120),
    ),
    "cold": (
        503,
        JSON_TYPE,
        _gateway(
            "internal_endpoint_error",
            "Error: Endpoint simulated online but not ready to receive tasks. "
            "Please try again later.",
        ),
    ),
    "tpm": (
        429,
        JSON_TYPE,
        _gateway(
            "too_many_requests",
            "Error: Too many tokens per minute.",
            global_model_usage="exceeded",
            user_model_usage="exceeded",
        ),
    ),
    "401_after": (
        401,
        JSON_TYPE,
        _gateway("unauthorized", "Error: Token is expired or has been revoked."),
    ),
}

REFUSING_FAULTS: Final = frozenset([*_ERROR_REPLIES, "429", "429_ra", "drop", "reset", "hang"])
"""Faults that are sent without an answer of the model."""


def send_fault(exchange: Exchange, rule: FaultRule) -> None:
    """Apply a fault that precedes all processing.

    Args:
        exchange: The request.
        rule: The fault; its kind is in `REFUSING_FAULTS`.
    """
    match rule.kind:
        case "429":
            exchange.reply(_rate_limit_body(rule), 429)
        case "429_ra":
            exchange.reply(_rate_limit_body(rule), 429, extra=_retry_after(rule))
        case "drop":
            exchange.drop()
        case "reset":
            exchange.reset()
        case "hang":
            pass  # the exchange stays open until the client disconnects
        case kind:
            status, content_type, body = _ERROR_REPLIES[kind]
            exchange.reply(body, status, content_type)


def send_unauthorized(exchange: Exchange) -> None:
    """Refuse a wrong key as vLLM does: here ``error`` is a string."""
    exchange.reply(b'{"error":"Unauthorized"}', 401)


def send_distorted(exchange: Exchange, body: dict[str, Any], kind: str) -> None:
    """Send a complete answer that the fault has distorted.

    Args:
        exchange: The request.
        body: The correct answer.
        kind: The fault.
    """
    match kind:
        case "malformed":
            whole = orjson.dumps(body)
            exchange.reply(whole[: len(whole) // 2])
        case "cut_body":
            exchange.send_truncated(orjson.dumps(body))
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

UNREADABLE_FAULTS: Final = DISTORTIONS | IN_STREAM
"""Faults that leave a billed answer that cannot be parsed."""
