"""Texts of models, inputs and servers as the page may show them: visible, and of bounded length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final

import orjson

from ...backends.core.terminal import escape_controls

MOST_CHARACTERS: Final = 500
"""Characters of a text in the file; longer ones are shortened, with their length."""

NONE: Final = "\N{EN DASH}"
"""Cell without a value."""

_MOST_PARTS: Final = 200
"""Elements of a list or an object in the file."""
_DEPTH: Final = 8
_MOST_OBJECTS: Final = 5
"""Objects of a list that a cell shows."""
_MOST_LISTED: Final = 3
"""Values of a list within an object that a cell shows."""
_LONGEST_WORD: Final = 30
"""Characters of a word that a table keeps whole."""


def shorten(text: str, size: str | None = None) -> str:
    """Return a text with its control characters spelled out, shortened if it is long.

    Args:
        text: The text.
        size: Its size in words, if ``text`` is only its beginning.
    """
    if size is None and len(text) > MOST_CHARACTERS:
        size = f"{len(text):,} characters"
    shown = escape_controls(text[:MOST_CHARACTERS])
    return shown if size is None else f"{shown}… ({size})"


def has_long_word(text: object) -> bool:
    """Return True if a table may break a text inside a word, because no column has its width."""
    return any(len(word) > _LONGEST_WORD for word in str(text).split())


def shorten_json(value: Any, depth: int = 0) -> Any:
    """Return JSON data in which all texts, lists and objects are shortened."""
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, Mapping | list) and depth == _DEPTH:
        return shorten(orjson.dumps(value).decode())
    if isinstance(value, Mapping):
        kept = list(value.items())[:_MOST_PARTS]
        found = {shorten(str(name)): shorten_json(one, depth + 1) for name, one in kept}
        if len(value) > _MOST_PARTS:
            found["…"] = f"{len(value) - _MOST_PARTS:,} more"
        return found
    if isinstance(value, list):
        more = len(value) - _MOST_PARTS
        return [shorten_json(one, depth + 1) for one in value[:_MOST_PARTS]] + [
            f"… {more:,} more" for _ in range(more > 0)
        ]
    return value


def to_text(value: Any) -> str:
    """Return a value as one text: JSON if it is none."""
    if isinstance(value, datetime):
        return value.isoformat(" ", "milliseconds")
    if isinstance(value, str | date | time | timedelta | Decimal):
        return str(value)
    return orjson.dumps(value, default=str).decode()


def to_cell(value: Any) -> str:
    """Return a value as one line of a table."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    if isinstance(value, list) and value and all(isinstance(one, dict) and one for one in value):
        return list_objects(value)
    return to_text(shorten_json(value) if isinstance(value, dict | list) else value)


def list_objects(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return a list of objects as one line: the first text of each, then its other fields by name.

    Args:
        objects: The objects, such as statements with the ids of their sources.
    """
    shown = [_describe_object(one) for one in objects[:_MOST_OBJECTS]]
    if (more := len(objects) - len(shown)) > 0:
        shown.append(f"{more:,} more")
    return " | ".join(shown)


def _describe_object(found: Mapping[str, Any]) -> str:
    title = next((name for name, one in found.items() if isinstance(one, str) and one), None)
    fields = [
        f"{shorten(name)}: {_list_values(one if isinstance(one, list) else [one])}"
        for name, one in found.items()
        if name != title and one is not None and one not in ("", [], {})
    ]
    if title is None:
        return ", ".join(fields) or to_text(shorten_json(found))
    text = shorten(found[title])
    return f"{text} ({'; '.join(fields)})" if fields else text


def _list_values(values: Sequence[Any]) -> str:
    shown = [to_text(shorten_json(one)) for one in values[:_MOST_LISTED]]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def parse_time(text: object) -> datetime | None:
    """Return the time of an ISO 8601 text, or None."""
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None


def format_seconds(seconds: float) -> str:
    """Return a duration in two units: ``1 h 05 min``."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"  # noqa: PLR2004
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004 - an hour
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min"
