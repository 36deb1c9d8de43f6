"""Limits of what fanfold records and sends as JSON, and the checks for them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final

import orjson

from .types import Json

MAX_COUNT: Final = 2**63 - 1
"""Largest count: the maximum of a signed 64-bit integer."""

MAX_TOKENS: Final = 2**32 - 1
"""Largest number of tokens that is accepted from a server's report of one request."""

MAX_DEPTH: Final = 200
"""Limit of nesting levels in one value: orjson writes 254, and a recorded, sent and aggregated
value is nested some levels deep in a larger one."""

COUNT_FIELDS: Final = (
    "requests",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "lost_tokens",
    "useful_tokens",
    "nano_usd",
    "useful_nano_usd",
    "reused",
)
"""Counts of a journal record, and of one endpoint's part in it; they may be null."""

_USAGE: Final = ("prompt_tokens", "completion_tokens", "cached_tokens")

STATUSES: Final = ("done", "failed")

_SHOWN: Final = 200
_MOST_DIGITS: Final = 30


def json_size(value: Any) -> int:
    """Return the bytes of a value as the longest JSON that engines send: ASCII, with blanks.

    Raises:
        TypeError: The value has no JSON form.
    """
    return len(json.dumps(orjson.loads(orjson.dumps(value))))


def is_count(value: object) -> bool:
    """Return True if a value is an integer from 0 to :data:`MAX_COUNT`."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def check_counts(data: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Check that values are counts or null.

    Args:
        data: The values by name; a name may be missing.
        names: The names to check.
        what: The object that holds them, for the message.

    Raises:
        ValueError: A value is neither.
    """
    for name in names:
        value = data.get(name)
        if value is not None and not is_count(value):
            msg = f"{what}: {name} is {_shorten(value)}, not an integer from 0 to 2^63 - 1"
            raise ValueError(msg)


def parse_token_count(value: object) -> int | None:
    """Return a number of tokens, or None if the value is not a plausible count for one request."""
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def clamp_counts(counted: MutableMapping[str, Any]) -> None:
    """Replace invalid counts in a record, in place: the record could not be read back.

    A count that is too large becomes :data:`MAX_COUNT`. For values that are not counts, a usage
    becomes unknown, and other fields 0.
    """
    for name in COUNT_FIELDS:
        value = counted.get(name)
        if value is None or (type(value) is int and 0 <= value <= MAX_COUNT):
            continue
        if type(value) is int and value > MAX_COUNT:
            counted[name] = MAX_COUNT
        else:
            counted[name] = None if name in _USAGE else 0


def check_record(record: object) -> None:
    """Check the counts of a journal record.

    Raises:
        ValueError: The value is not a record, or a number in it is out of range.
    """
    if not isinstance(record, dict) or not is_count(record.get("index")):
        raise ValueError("not a record of an item")
    name = f"item {record.get('id')!r}"
    if record.get("status") not in STATUSES:
        raise ValueError(f"{name}: unknown status")
    shares = record.get("shares") or ()
    if not isinstance(shares, list | tuple) or not all(isinstance(one, dict) for one in shares):
        raise ValueError(f"{name}: shares is not a list of objects")
    for counted in (record, *shares):
        check_counts(counted, COUNT_FIELDS, name)


def is_too_deep(data: str | bytes, value: Json) -> bool:
    """Return True if a value has more than :data:`MAX_DEPTH` levels.

    Args:
        data: The value as JSON text; nearly all values pass by counting its brackets, without a
            walk.
        value: The value.
    """
    if isinstance(data, str):
        brackets = data.count("[") + data.count("{")
    else:
        brackets = data.count(b"[") + data.count(b"{")
    return brackets > MAX_DEPTH and _levels(value) > MAX_DEPTH


def _levels(value: Json) -> int:
    """Count the levels of lists and objects, up to one more than :data:`MAX_DEPTH`."""
    levels, level = 0, [value]
    while levels <= MAX_DEPTH:
        level = [one for one in level if isinstance(one, dict | list | tuple)]
        if not level:
            break
        levels += 1
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return levels


def to_json_text(value: Any) -> str:
    """Return a value as JSON text; if it has none, its shortened Python text."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return _shorten(value)


def name_values(values: Iterable[Json]) -> list[str]:
    """Return a name for each of some different values: a text itself, else JSON.

    A text that is empty or the name of another value is quoted: ``"1"`` beside the number 1. The
    names do not depend on the order of the values.
    """
    listed = list(values)
    taken = {"", *(to_json_text(value) for value in listed if not isinstance(value, str))}
    quoted = dict[str, str]()
    for text in sorted(one for one in listed if isinstance(one, str)):
        name = text
        while name in taken:
            name = to_json_text(name)
        taken.add(name)
        quoted[text] = name
    return [quoted[v] if isinstance(v, str) else to_json_text(v) for v in listed]


def replace_surrogates(text: str) -> str:
    """Return a text with ``?`` in place of half surrogate pairs, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def parse_json(data: bytes) -> Any:
    """Parse JSON of a foreign program, also if it breaks the rules of JSON.

    A byte order mark, UTF-16, invalid UTF-8 and raw control characters in texts are accepted. A
    number that is not finite becomes null, and half a surrogate pair ``?``.

    Raises:
        ValueError: The data is not JSON.
        RecursionError: It has more levels of lists and objects than can be parsed.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return parse_json_text(data.decode(json.detect_encoding(data), errors="replace"))


def parse_json_text(text: str) -> Any:
    """Parse JSON text that may break the rules of JSON, as :func:`parse_json` does.

    Raises:
        ValueError: The text is not JSON.
        RecursionError: It has more levels of lists and objects than can be parsed.
    """
    value = json.loads(
        text.strip("\ufeff \t\r\n"),
        strict=False,
        parse_int=_parse_finite,
        parse_float=_parse_finite,
        parse_constant=lambda _name: None,
    )
    return _replace_all_surrogates(value)


def _parse_finite(text: str) -> int | float | None:
    """Return a number as orjson reads it, or None if no float holds it."""
    if (
        text.lstrip("-").isdecimal()
        and len(text) < _MOST_DIGITS
        and -MAX_COUNT - 1 <= int(text) <= 2 * MAX_COUNT + 1
    ):
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else None


def _replace_all_surrogates(value: Any) -> Any:
    """Apply :func:`replace_surrogates` to each text and key of a JSON value, without recursion."""
    root = [value]
    todo: list[Any] = [root]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if any(replace_surrogates(key) != key for key in one):
                pairs = [(replace_surrogates(key), inner) for key, inner in one.items()]
                one.clear()
                one.update(pairs)
            places: Iterable[Any] = list(one)
        else:
            places = range(len(one))
        for place in places:
            inner = one[place]
            if isinstance(inner, str):
                one[place] = replace_surrogates(inner)
            elif isinstance(inner, dict | list):
                todo.append(inner)
    return root[0]


def cut_deep_levels(data: bytes, value: Any) -> None:
    """Replace values below :data:`MAX_DEPTH` levels with null, in place.

    Args:
        data: The value as JSON text.
        value: The value.
    """
    if not is_too_deep(data, value):
        return
    level = [value]
    for levels in range(MAX_DEPTH):
        below = []
        for one in level:
            for place in list(one) if isinstance(one, dict) else range(len(one)):
                if isinstance(one[place], dict | list):
                    if levels == MAX_DEPTH - 1:
                        one[place] = None
                    else:
                        below.append(one[place])
        level = below


def to_plain_json(value: Any) -> Json:
    """Return the output of user code as plain JSON data, the same for all readers.

    Tuples become lists, dates and times text in ISO 8601, dataclasses objects.

    Raises:
        ValueError: JSON cannot represent it, or it has more than :data:`MAX_DEPTH` levels.
    """
    try:
        data = orjson.dumps(value)
        plain: Json = orjson.loads(data)
    except (TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(_reason(error)) from None
    if is_too_deep(data, plain):
        raise ValueError(f"it has more than {MAX_DEPTH} levels of lists and objects")
    if b"null" in data and (odd := _find_non_finite(value)) is not None:
        raise ValueError(f"it holds {odd}, which JSON has no number for")
    return plain


def _reason(error: Exception) -> str:
    if "ecursion" in str(error):
        return f"it has more than {MAX_DEPTH} levels of lists and objects"
    return replace_surrogates(str(error))


def _find_non_finite(value: Any) -> float | None:
    """Return a NaN or an infinity within a value, or None."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, float):
            if not math.isfinite(one):
                return one
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
        elif dataclasses.is_dataclass(one):
            todo += (getattr(one, field.name) for field in dataclasses.fields(one))
    return None


def _shorten(value: Any) -> str:
    try:
        text = replace_surrogates(repr(value))
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
