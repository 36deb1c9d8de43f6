"""Finding values in outputs, and making them fit for a state."""

from __future__ import annotations

from math import isfinite
from typing import Final, TypeAlias

from ...backends.core.types import Json

Path: TypeAlias = tuple[str, ...]
"""Keys from the output down to a value."""

SHOWN_CHARACTERS: Final = 2_000
"""Longer texts are cut where a state carries them for show."""

DEPTH: Final = 100
"""What is nested deeper would break writers, whose own limits begin at some 250 levels."""

_INT64: Final = 1 << 63


def path_of(field: str) -> Path:
    """Return the keys of a dotted path, e.g. ``a.b``."""
    return tuple(field.split("."))


def pick(output: Json, path: Path) -> Json:
    """Return the value at a path, or None where the path leads nowhere."""
    for key in path:
        if not isinstance(output, dict):
            return None
        output = output.get(key)
    return output


def number(value: Json) -> int | float | None:
    """Return a finite number that a state can carry, or None for anything else.

    Booleans are no numbers. Integers outside 64 bits become the nearest double; beyond the
    range of doubles they count as not finite.
    """
    kind = value.__class__
    if kind is float:
        return float(value) if isfinite(value) else None
    if kind is not int:
        return None
    if -_INT64 <= value < _INT64:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return None


def carried(value: Json, longest: int | None = None, depth: int = DEPTH) -> Json:
    """Return a copy of a JSON value that survives every JSON and msgpack writer.

    Non-finite floats become None, integers outside 64 bits hexadecimal text, lone surrogates
    question marks, and what is nested too deep an ellipsis.

    Args:
        value: Any JSON value.
        longest: Cut texts to this many characters, or None.
        depth: Most levels of lists and objects.
    """
    if isinstance(value, str):
        return _text(value, longest)
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else hex(value)
    if isinstance(value, dict | list | tuple):
        return _nested(value, longest, depth - 1) if depth else "…"
    return value


def _nested(value: Json, longest: int | None, depth: int) -> Json:
    if isinstance(value, dict):
        return {_text(str(k), longest): carried(v, longest, depth) for k, v in value.items()}
    return [carried(item, longest, depth) for item in value]


def _text(text: str, longest: int | None) -> str:
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
