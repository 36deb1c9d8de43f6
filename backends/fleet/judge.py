"""Whether an answer with status 200 is a chat completion or only looks like one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from ..contract.types import SIMULATED_FINGERPRINT, Reply, Usage
from . import failures
from .answer import Complaint, RawAnswer
from .failures import Failure

GATEWAY_ERROR_ID: Final = "chatcmpl-api-error"
"""Id under which the FIRST gateway hides an error of the server behind it."""

ABORTED: Final = frozenset({"abort", "error"})
"""Finish reasons of a server that is shutting down; the text is partial."""


SAID: Final = ("content", "tool_calls", "refusal", "function_call", "audio")
"""Fields of a message by which it says something."""


def read(answer: RawAnswer, endpoint: str) -> dict[str, Any] | Failure:
    """Decode an answer, or say why it is none.

    Args:
        answer: The answer as it came, with any status.
        endpoint: The endpoint's label.
    """
    if answer.status != 200:  # noqa: PLR2004 - HTTP's own number
        return failures.of_answer(answer, endpoint)
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        document = None
    problem = _problem(document)
    if problem is None:
        return failures.of_abort(answer, endpoint) if _is_aborted(document) else document
    if isinstance(document, dict) and (document.get("error") or document.get("object") == "error"):
        complaint = Complaint.of(document)
        return failures.of_complaint(answer, complaint, _inner_status(complaint), endpoint)
    return failures.of_reply(answer, problem, endpoint)


def _problem(document: Any) -> str | None:
    if not isinstance(document, dict):
        return "the answer is no JSON object"
    if document.get("error"):
        return "an error in an answer with status 200"
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices:
        return "the answer holds no choices"
    first = choices[0]
    if not isinstance(first, dict) or not isinstance(first.get("message"), dict):
        return "the answer holds no message"
    return None


def is_completion(document: Any) -> bool:
    """Tell whether something is a chat completion."""
    return _problem(document) is None


def _is_aborted(document: dict[str, Any]) -> bool:
    reason = document["choices"][0].get("finish_reason")
    aborted = isinstance(reason, str) and reason in ABORTED
    return aborted or document.get("id") == GATEWAY_ERROR_ID


def is_empty(document: Mapping[str, Any]) -> bool:
    """Tell whether a good answer says nothing at all although it was not cut."""
    choice = document["choices"][0]
    message = choice["message"]
    return choice.get("finish_reason") in ("stop", None) and not any(map(message.get, SAID))


def _inner_status(complaint: Complaint) -> int:
    code = complaint.code or ""
    return int(code) if code.isdigit() and 400 <= int(code) < 600 else 500  # noqa: PLR2004


def is_simulated(document: Mapping[str, Any]) -> bool:
    """Tell whether a simulated fleet made this answer."""
    return document.get("system_fingerprint") == SIMULATED_FINGERPRINT


def usage_of(document: Mapping[str, Any]) -> Usage:
    """Return the tokens that an answer reports; unknown stays None."""
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Usage(_count(prompt), _count(completion), cached)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def reply_of(document: dict[str, Any], endpoint: str) -> Reply:
    """Turn a chat completion into a reply.

    Args:
        document: The decoded answer, judged good.
        endpoint: Label of the endpoint that gave it.
    """
    choice = document["choices"][0]
    message = choice["message"]
    return Reply(
        content=message.get("content") or "",
        finish_reason=choice.get("finish_reason"),
        refusal=message.get("refusal"),
        usage=usage_of(document),
        endpoint=endpoint,
        model=document.get("model") or "",
        simulated=is_simulated(document),
    )
