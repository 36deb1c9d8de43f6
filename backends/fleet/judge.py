"""Whether an answer with status 200 is a chat completion or only looks like one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..core.types import SIMULATED_FINGERPRINT, Reply, Usage
from ..core.values import cut_levels, json_text, read_json, token_count
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
        document = read_json(answer.body)
    except RecursionError:
        return failures.of_levels(answer.masked(), endpoint)
    except ValueError:
        document = None
    problem = _problem(document)
    if problem is None:
        make_plain(document)
        cut_levels(answer.body, document)
        if _is_aborted(document):
            return failures.of_abort(answer.masked(), endpoint)
        plain: dict[str, Any] = document
        return plain
    answer = answer.masked()
    if isinstance(document, dict) and (document.get("error") or document.get("object") == "error"):
        complaint = Complaint.of(read_json(answer.body))
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
    return None if any(map(_has_message, choices)) else "the answer holds no message"


def _has_message(choice: Any) -> bool:
    return isinstance(choice, dict) and isinstance(choice.get("message"), dict)


def make_plain(document: dict[str, Any]) -> None:
    """Give a chat completion's fields the types that they have by its specification, in place.

    Servers and what stands in between write other ones. What is no count is not told, a name that
    is no text is none, a choice without a message and tool calls that are no calls are left out,
    and what is no text becomes its JSON: the answer is paid, and counts.
    """
    _make_plain_top(document)
    choices = document["choices"] = [one for one in document["choices"] if _has_message(one)]
    for choice in choices:
        message = choice["message"]
        if message.get("role") != "assistant":
            message["role"] = "assistant"
        if calls := message.get("tool_calls"):
            message["tool_calls"] = _plain_calls(calls)
        if call := message.get("function_call"):
            message["function_call"] = _plain_function(call)
        _make_plain_choice(choice, message)


def make_plain_chunk(chunk: dict[str, Any]) -> None:
    """Give the fields of one event of a stream their types, as :func:`make_plain` does, in place.

    Unlike in a whole answer, each part of a tool call may be missing: another event brings it.
    """
    _make_plain_top(chunk)
    chunk.pop("chunk", None)  # LangChain looks for choices there
    choices = chunk.get("choices")
    choices = chunk["choices"] = (
        [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    )
    for choice in choices:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice["delta"] = {"content": delta} if isinstance(delta, str) else {}
        if delta.get("role", "assistant") != "assistant":
            delta["role"] = "assistant"
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = _plain_call_parts(calls)
        if call := delta.get("function_call"):
            delta["function_call"] = _plain_function_part(call)
        _make_plain_choice(choice, delta)
        if logprobs := choice.get("logprobs"):  # LangChain joins those of all events
            lists = {name: one for name, one in logprobs.items() if isinstance(one, list)}
            choice["logprobs"] = lists or None


def _make_plain_top(document: dict[str, Any]) -> None:
    for name in ("model", "system_fingerprint", "id", "service_tier"):
        if not isinstance(document.get(name, ""), str):
            document[name] = None
    usage = document.get("usage")
    if usage is not None and not _is_usage(usage):
        document["usage"] = _plain_usage(usage)


def _make_plain_choice(choice: dict[str, Any], said: dict[str, Any]) -> None:
    """Give a choice's fields and those of its message, or of a part of it, their types."""
    reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    if reason is not None and not isinstance(reason, str):
        choice["finish_reason"] = json_text(reason)
    if logprobs is not None and not isinstance(logprobs, dict):
        choice["logprobs"] = None
    for name in ("content", "refusal"):
        value = said.get(name)
        if value is None or isinstance(value, str):
            continue
        said[name] = _joined(value) or json_text(value)
    if (audio := said.get("audio")) is not None and not isinstance(audio, dict):
        said["audio"] = None
    for name in ("name", "id"):
        if not isinstance(said.get(name, ""), str):
            said[name] = None


def _plain_calls(calls: Any) -> list[dict[str, Any]] | None:
    """Return the tool calls of a message, or None if one is no call of a function."""
    if not isinstance(calls, list):
        return None
    found = []
    for call in calls:
        function = _plain_function(call.get("function")) if isinstance(call, dict) else None
        if function is None:
            return None
        name = call.get("id")
        plain_id = name if name is None or isinstance(name, str) else json_text(name)
        found.append({**call, "id": plain_id, "function": function})
    return found


def _plain_function(function: Any) -> dict[str, Any] | None:
    """Return a function's call with its arguments as JSON text, or None if it is no call."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return function
    return {**function, "arguments": json_text({} if arguments is None else arguments)}


def _plain_call_parts(calls: Any) -> list[dict[str, Any]] | None:
    """Return the parts of tool calls that an event brings, or None if one is none."""
    if not isinstance(calls, list):
        return None
    found = []
    for place, call in enumerate(calls):
        function = _plain_function_part(call.get("function")) if isinstance(call, dict) else None
        if function is None:
            return None
        index, name = call.get("index"), call.get("id")
        found.append(
            {
                **call,
                "index": index if type(index) is int else place,
                "id": name if name is None or isinstance(name, str) else json_text(name),
                "function": function,
            }
        )
    return found


def _plain_function_part(function: Any) -> dict[str, Any] | None:
    if function is None:
        return {}
    if not isinstance(function, dict):
        return None
    name, arguments = function.get("name"), function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = json_text(arguments)
    return {**function, "name": name if isinstance(name, str) else None, "arguments": arguments}


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
        if (value := usage.get(name)) is not None and token_count(value) is None:
            return False
    return all(_are_details(usage.get(name)) for name in _DETAILS)


def _are_details(details: Any) -> bool:
    return details is None or (
        isinstance(details, dict)
        and all(value is None or token_count(value) is not None for value in details.values())
    )


def _plain_usage(usage: Any) -> dict[str, Any] | None:
    """Return what can be believed of a usage."""
    if not isinstance(usage, dict):
        return None
    plain: dict[str, Any] = {
        name: value for name in _COUNTS if (value := token_count(usage.get(name))) is not None
    }
    for name in _DETAILS:
        if isinstance(details := usage.get(name), dict):
            plain[name] = {k: v for k, v in details.items() if token_count(v) is not None}
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
    cached = token_count(details.get("cached_tokens")) if isinstance(details, dict) else None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Usage(token_count(prompt), token_count(completion), cached)


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
