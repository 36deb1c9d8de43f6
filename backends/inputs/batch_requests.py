"""Requests in OpenAI's batch format: checks of the lines, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from ..core.errors import InputError
from ..core.types import CHAT_URL, Json, Row
from .base import RowSource

_ID: Final = "custom_id"


def read_requests(source: RowSource) -> RowSource:
    """Return a source of requests: rows with ``custom_id``, ``url`` and ``body``.

    Only what fanfold itself needs is checked; the servers check the rest. A request for another URL
    than chat completions is accepted: its item fails without a request.

    Args:
        source: Yields the lines of the batch.

    Raises:
        InputError: While the rows are read: a line is no request, or the lines name several models.
    """

    def rows() -> Iterator[tuple[int, Row]]:
        model: str | None = None
        for position, line in source.rows():
            if problem := find_problem(line):
                raise InputError(f"{source.describe_position(position)}: {problem}")
            named = get_model(line)
            if named is not None:
                model = model or named
                if named != model:
                    raise InputError(
                        f"{source.describe_position(position)}: the model is {named!r}, but lines "
                        f"before it name {model!r}; a batch has one model: split it by model, one "
                        "file and one output each"
                    )
            yield position, {key: line[key] for key in (_ID, "url", "body")}

    return replace(source, rows=rows, id=_ID, ragged=True)


def find_problem(line: Mapping[str, Json]) -> str | None:
    """Return what is wrong with a line of a batch, or None."""
    for key in (_ID, "method", "url", "body"):
        if key not in line:
            return (
                f"{key!r} is missing; a line of OpenAI's batch format is "
                '{"custom_id": …, "method": "POST", "url": …, "body": {…}}'
            )
    name, method, url, body = line[_ID], line["method"], line["url"], line["body"]
    if not isinstance(name, str) or not name or name != name.strip():
        return f"custom_id must be text without blanks at its ends (found {_show(name)})"
    if method != "POST":
        return f'method must be "POST" (found {_show(method)})'
    if not isinstance(url, str):
        return f"url must be text, e.g. {CHAT_URL} (found {_show(url)})"
    if not isinstance(body, dict):
        return f"body must be an object (found {_show(body)})"
    return _find_body_problem(body) if url == CHAT_URL else None


def _find_body_problem(body: Mapping[str, Json]) -> str | None:
    """Return what is wrong with a chat request, or None."""
    messages = body.get("messages")
    if not (isinstance(messages, list) and messages and all(map(_is_object, messages))):
        return f"body.messages must be a list of messages (found {_show(messages)})"
    for key, is_fit, wanted in _FIELDS:
        if (value := body.get(key)) is not None and not is_fit(value):
            return f"body.{key} must be {wanted} (found {_show(value)})"
    schema = (body.get("response_format") or {}).get("json_schema")
    if schema is not None and not _is_object(schema):
        return f"body.response_format.json_schema must be an object (found {_show(schema)})"
    return None


def _is_object(value: Json) -> bool:
    return isinstance(value, dict)


def _is_list(value: Json) -> bool:
    return isinstance(value, list)


def _is_name(value: Json) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Json) -> bool:
    return type(value) is int and value > 0


_COUNT: Final = "a whole number above 0"
_FIELDS: Final = (
    ("model", _is_name, "the name of a model"),
    ("max_tokens", _is_count, _COUNT),
    ("max_completion_tokens", _is_count, _COUNT),
    ("n", _is_count, _COUNT),
    ("response_format", _is_object, "an object"),
    ("tools", _is_list, "a list"),
)
"""Fields of a request that fanfold itself reads, if they are there."""


def get_model(line: Mapping[str, Json]) -> str | None:
    """Return the model that a checked line names; None if it names none or is no chat request."""
    model = line["body"].get("model") if line["url"] == CHAT_URL else None
    return model if isinstance(model, str) else None


def find_model(source: RowSource) -> str | None:
    """Return the model that the first line with a model names; blocks.

    Raises:
        InputError: The input cannot be read, or a line before it is no request.
    """
    return next(filter(None, (get_model(row) for _, row in source.rows())), None)


def find_unlimited(source: RowSource) -> str | None:
    """Return the position, in words, of the first chat request without ``max_tokens``; blocks.

    Raises:
        InputError: The input cannot be read, or a line is no request.
    """
    for position, row in source.rows():
        body: dict[str, Any] = row["body"]
        if row["url"] == CHAT_URL and not (
            body.get("max_tokens") or body.get("max_completion_tokens")
        ):
            return source.describe_position(position)
    return None


def find_field(
    source: RowSource, explain: Callable[[Iterable[str]], str | None]
) -> tuple[str, str] | None:
    """Return the position, in words, of the first chat request with an unfit field; blocks.

    Args:
        source: Yields the lines of the batch.
        explain: Returns what is wrong with the top-level fields of a request, or None.

    Returns:
        The position and what is wrong, or None.

    Raises:
        InputError: The input cannot be read, or a line is no request.
    """
    for position, row in source.rows():
        if row["url"] == CHAT_URL and (problem := explain(row["body"])) is not None:
            return source.describe_position(position), problem
    return None


_SHOWN: Final = 40


def _show(value: Json) -> str:
    """Return a value for a message: short, and text in quotes."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
