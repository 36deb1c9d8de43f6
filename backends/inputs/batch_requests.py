"""Requests in OpenAI's batch format: checks of the lines, and their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from ...configs.endpoints import explain_refused_fields
from ..core.errors import InputError
from ..core.request_urls import GATEWAY_URLS, REQUEST_KINDS, REQUEST_URLS
from ..core.terminal import count_nouns
from ..core.types import CHAT_URL, Json, Row
from .base import RowSource

_ID: Final = "custom_id"
_MODELS: Final = 5
"""Models that a message lists."""


def read_requests(source: RowSource) -> RowSource:
    """Return a source of requests: rows with ``custom_id``, ``url`` and ``body``.

    Only what fanfold itself needs is checked; the servers check the rest. A request for a URL that
    fanfold does not know is accepted: its item fails without a request.

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
                    where = source.describe_position(position)
                    raise InputError(_explain_models(where, named, model, source))
            yield position, {key: line[key] for key in (_ID, "url", "body")}

    return replace(source, rows=rows, id=_ID, ragged=True)


def _explain_models(where: str, named: str, before: str, source: RowSource) -> str:
    """Return what to do with a file whose lines name several models; reads all of it."""
    lines = (line for _, line in source.rows() if find_problem(line) is None)
    counts = Counter(model for line in lines if (model := get_model(line)) is not None)
    shown = ", ".join(
        f"{name!r} ({count_nouns(count, 'line')})" for name, count in counts.most_common(_MODELS)
    )
    more = f" and {len(counts) - _MODELS:,} more" if len(counts) > _MODELS else ""
    return (
        f"{where}: the model is {named!r}, but lines before it name {before!r}. The file names "
        f"{shown}{more}; a batch has one model: split the file by model, with an output for each, "
        "e.g. jq -c 'select(.body.model == \"NAME\")'"
    )


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
    return _find_body_problem(url, body) if url in REQUEST_URLS else None


def _find_body_problem(url: str, body: Mapping[str, Json]) -> str | None:
    """Return what is wrong with a request, or None."""
    messages = body.get("messages")
    is_list = isinstance(messages, list) and messages and all(map(_is_object, messages))
    if url == CHAT_URL and not is_list:
        return f"body.messages must be a list of messages (found {_show(messages)})"
    kind = REQUEST_KINDS.get(url)
    if kind is not None and not any(body.get(name) for name in kind.required):
        return f"body has none of {', '.join(kind.required)}, which {url} reads"
    if kind is not None and kind.file is not None:
        return _find_form_problem(url, body, kind.file)
    for key, is_fit, wanted in _FIELDS:
        if (value := body.get(key)) is not None and not is_fit(value):
            return f"body.{key} must be {wanted} (found {_show(value)})"
    schema = (body.get("response_format") or {}).get("json_schema")
    if schema is not None and not _is_object(schema):
        return f"body.response_format.json_schema must be an object (found {_show(schema)})"
    return None


def _find_form_problem(url: str, body: Mapping[str, Json], member: str) -> str | None:
    """Return what is wrong with a request that is sent as a form, or None."""
    if "file" in body:
        return f"body.file has no place in a batch: {url} reads body.{member}"
    for key in (member, "model"):
        if (value := body.get(key)) is not None and not _is_name(value):
            return f"body.{key} must be text (found {_show(value)})"
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
    """Return the model that a checked line names; None if it names none, or is not sent."""
    model = line["body"].get("model") if line["url"] in REQUEST_URLS else None
    return model if isinstance(model, str) else None


def find_model(source: RowSource) -> str | None:
    """Return the model that the first line with a model names; blocks.

    Raises:
        InputError: The input cannot be read, or a line before it is no request.
    """
    return next(filter(None, (get_model(row) for _, row in source.rows())), None)


def explain_unlimited(row: Row, *, counts_tokens: bool) -> str | None:
    """Return why the cost of a request is unlimited, or None.

    Args:
        row: The request.
        counts_tokens: Whether the budget is one of tokens or US dollars.
    """
    body: dict[str, Any] = row["body"]
    kind = REQUEST_KINDS.get(row["url"])
    generates = row["url"] == CHAT_URL or (kind is not None and kind.generates)
    if generates and not (body.get("max_tokens") or body.get("max_completion_tokens")):
        return (
            "a budget is set, but this request has neither max_tokens nor max_completion_tokens, "
            "so its cost is unlimited; add one to each line, or run without a budget"
        )
    if counts_tokens and kind is not None and kind.file is not None:
        return (
            "a budget of tokens or US dollars is set, but the tokens of audio are not known before "
            "its answer; use a budget of requests or node hours"
        )
    return None


def explain_gateway_refusal(row: Row, *, by_batch: bool = False) -> str | None:
    """Return why a request cannot go through a FIRST gateway; None: it can, or is not sent.

    Args:
        row: The request.
        by_batch: Whether it goes through the gateway's batch mode.
    """
    url = row["url"]
    if url not in REQUEST_URLS:
        return None
    if url not in GATEWAY_URLS:
        return f"a FIRST gateway has no {url}; it has {', '.join(GATEWAY_URLS)}"
    if by_batch and url != CHAT_URL:
        return f"backend.kind: batch sends chat completions only, not {url}; leave it out"
    return explain_refused_fields(row["body"])


def find_unfit(source: RowSource, explain: Callable[[Row], str | None]) -> tuple[str, str] | None:
    """Return the position, in words, of the first request that is unfit; blocks.

    Args:
        source: Yields the lines of the batch.
        explain: Returns what is wrong with a request, or None.

    Returns:
        The position and what is wrong, or None.

    Raises:
        InputError: The input cannot be read, or a line is no request.
    """
    for position, row in source.rows():
        if (problem := explain(row)) is not None:
            return source.describe_position(position), problem
    return None


_SHOWN: Final = 40


def _show(value: Json) -> str:
    """Return a value for a message: short, and text in quotes."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
