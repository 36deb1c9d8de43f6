"""Fits values into cells of a shape; whatever comes, a cell results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from ...contract.types import Json
from .columns import json_text
from .shape import INT64, Kind, Shape

Fitted: TypeAlias = tuple[Json, bool]
"""A cell, and whether it holds all of the value."""


def fit(shape: Shape, value: Json) -> Fitted:
    """Return the cell for a value.

    Args:
        shape: The cell's type.
        value: Any value read from JSON, allowed by the schema or not.

    Returns:
        The cell, null where the shape cannot hold the value, and whether it holds all of it.
    """
    if value is None:
        return None, True
    if shape.kind == "list":
        return _list(shape.parts[0][1], value)
    if shape.kind == "struct":
        return _struct(shape, value)
    return _SCALARS[shape.kind](value)


def _free(value: Json) -> Fitted:
    return (value if isinstance(value, str) else json_text(value)), True


def _json(value: Json) -> Fitted:
    return json_text(value), True


def _text(value: Json) -> Fitted:
    return (value, True) if isinstance(value, str) else (None, False)


def _boolean(value: Json) -> Fitted:
    return (value, True) if isinstance(value, bool) else (None, False)


def _integer(value: Json) -> Fitted:
    """Take 3.0 for 3, as JSON Schema does."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in INT64:
        return None, False
    return value, True


def _number(value: Json) -> Fitted:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, False
    return float(value), True


def _list(element: Shape, value: Json) -> Fitted:
    if not isinstance(value, list):
        return None, False
    fitted = [fit(element, item) for item in value]
    return [cell for cell, _ in fitted], all(fits for _, fits in fitted)


def _struct(shape: Shape, value: Json) -> Fitted:
    if not isinstance(value, Mapping):
        return None, False
    fitted = {name: fit(part, value.get(name)) for name, part in shape.parts}
    whole = value.keys() <= fitted.keys() and all(fits for _, fits in fitted.values())
    return {name: cell for name, (cell, _) in fitted.items()}, whole


_SCALARS: Final[Mapping[Kind, Callable[[Json], Fitted]]] = {
    "free": _free,
    "json": _json,
    "text": _text,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
}
