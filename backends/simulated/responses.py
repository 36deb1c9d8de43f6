"""Bodies of good answers, in the form of vLLM 0.32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..core.types import SIMULATED_FINGERPRINT
from .answering import Answer
from .spec import UsageMode
from .tokens import cut

DONE: Final = b"data: [DONE]\n\n"
_FIRST_TOKENS: Final = 1
_BURST: Final = 8
"""Tokens in one chunk of a stream."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What surrounds an answer.

    Attributes:
        id: The answer's id.
        created: Unix time in seconds.
        model: The model's name.
        chat: Whether it answers a chat completion.
        usage: The usage object, or None where the server leaves it out or null.
        omit_usage: Whether the key ``usage`` is left out.
    """

    id: str
    created: int
    model: str
    chat: bool
    usage: dict[str, Any] | None
    omit_usage: bool = False


def usage_object(mode: UsageMode, prompt: int, completion: int) -> dict[str, Any] | None:
    """Return the five keys of ``usage``.

    Args:
        mode: The fleet's usage mode.
        prompt: Prompt tokens.
        completion: Output tokens.

    Returns:
        The object, or None in the modes ``null`` and ``omit``.
    """
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
    """Return a whole answer.

    Args:
        envelope: What surrounds it.
        answer: The answer.

    Returns:
        The JSON object.
    """
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
        "logprobs": None,
        "finish_reason": answer.finish_reason,
        "stop_reason": None,
        "token_ids": None,
    }


def _tool_call(envelope: Envelope, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-tool-{envelope.id[-16:]}",
        "type": "function",
        "function": {"name": answer.tool, "arguments": answer.text},
    }


def event(data: Any) -> bytes:
    """Encode one server-sent event.

    Args:
        data: Its JSON.

    Returns:
        The event's bytes.
    """
    return b"data: " + orjson.dumps(data) + b"\n\n"


def opening(envelope: Envelope, answer: Answer) -> bytes:
    """Return a stream's first events: the role and the first token.

    Args:
        envelope: What surrounds the answer.
        answer: The answer.

    Returns:
        The events' bytes.
    """
    first = cut(answer.text, _FIRST_TOKENS)
    if not envelope.chat:
        return event(_chunk(envelope, {"text": first}))
    role = event(_chunk(envelope, {"delta": {"role": "assistant", "content": ""}}))
    return role + event(_chunk(envelope, _delta(envelope, answer, first, named=True)))


def middle(envelope: Envelope, answer: Answer) -> bytes:
    """Return a stream's events between the first token and the finish.

    Args:
        envelope: What surrounds the answer.
        answer: The answer.

    Returns:
        The events' bytes.
    """
    rest, events = answer.text[len(cut(answer.text, _FIRST_TOKENS)) :], []
    while rest:
        burst = cut(rest, _BURST)
        rest = rest[len(burst) :]
        delta = _delta(envelope, answer, burst) if envelope.chat else {"text": burst}
        events.append(event(_chunk(envelope, delta)))
    return b"".join(events)


def closing(envelope: Envelope, answer: Answer, include_usage: bool) -> bytes:
    """Return a stream's last events: the finish, the usage if asked for, and ``[DONE]``.

    Args:
        envelope: What surrounds the answer.
        answer: The answer.
        include_usage: Whether the client asked for usage.

    Returns:
        The events' bytes.
    """
    empty: dict[str, Any] = {"delta": {}} if envelope.chat else {"text": ""}
    finish = event(_chunk(envelope, empty, answer.finish_reason))
    if not include_usage or envelope.omit_usage:
        return finish + DONE
    last = {**_chunk(envelope, empty), "choices": [], "usage": envelope.usage}
    return finish + event(last) + DONE


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
