"""Whether an answer with status 200 is a chat completion or only looks like one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from ..contract.types import SIMULATED_FINGERPRINT, Reply, Usage
from ..contract.values import MOST_TOKENS, json_text
from . import failures
from .answer import Complaint, RawAnswer
from .failures import Failure

GATEWAY_ERROR_ID: Final = "chatcmpl-api-error"
"""Id under which the FIRST gateway hides an error of the server behind it."""

_COUNTS: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
_DETAILS: Final = ("prompt_tokens_details", "completion_tokens_details")

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
        return failures.of_answer(answer.masked(), endpoint)
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        document = None
    problem = _problem(document)
    if problem is None:
        make_plain(document)
        if _is_aborted(document):
            return failures.of_abort(answer.masked(), endpoint)
        plain: dict[str, Any] = document
        return plain
    answer = answer.masked()
    if isinstance(document, dict) and (document.get("error") or document.get("object") == "error"):
        complaint = Complaint.read(answer.body)
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


def make_plain(document: dict[str, Any]) -> None:
    """Give a chat completion's fields the types that they have by its specification, in place.

    Servers and what stands in between write other ones. What is no count is not told, a name that
    is no text is none, and what is no text becomes its JSON: the answer is paid, and counts.
    """
    for name in ("model", "system_fingerprint", "id"):
        if not isinstance(document.get(name, ""), str):
            document[name] = None
    usage = document.get("usage")
    if usage is not None and not _is_usage(usage):
        document["usage"] = _plain_usage(usage)
    for choice in document["choices"]:
        if isinstance(choice, dict):
            _make_plain_choice(choice)


def _make_plain_choice(choice: dict[str, Any]) -> None:
    reason, message = choice.get("finish_reason"), choice.get("message")
    if reason is not None and not isinstance(reason, str):
        choice["finish_reason"] = json_text(reason)
    if not isinstance(message, dict):
        return
    for name in ("content", "refusal"):
        value = message.get(name)
        if value is None or isinstance(value, str):
            continue
        message[name] = _joined(value) or json_text(value)


def _joined(content: Any) -> str | None:
    """Return the text of a content that comes in parts, or None if it is none."""
    if not isinstance(content, list):
        return None
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def _is_usage(usage: Any) -> bool:
    """Say whether all that is read of a usage is as it should be, as nearly always."""
    if not isinstance(usage, dict):
        return False
    for name in _COUNTS:
        if (value := usage.get(name)) is not None and _count(value) is None:
            return False
    return all(_are_details(usage.get(name)) for name in _DETAILS)


def _are_details(details: Any) -> bool:
    return details is None or (
        isinstance(details, dict)
        and all(value is None or _count(value) is not None for value in details.values())
    )


def _plain_usage(usage: Any) -> dict[str, Any] | None:
    """Return what can be believed of a usage."""
    if not isinstance(usage, dict):
        return None
    plain: dict[str, Any] = {
        name: value for name in _COUNTS if (value := _count(usage.get(name))) is not None
    }
    for name in _DETAILS:
        if isinstance(details := usage.get(name), dict):
            plain[name] = {k: v for k, v in details.items() if _count(v) is not None}
    return plain


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
    """Return a number of tokens, or None if it is none that a request can have taken."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


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
