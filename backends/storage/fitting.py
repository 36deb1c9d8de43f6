"""Fits values into cells of a shape; whatever comes, a cell results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import NoneType
from typing import Any, Final, TypeAlias

from ..core.types import Json
from .columns import json_text
from .results_schema import INT64, Kind, Shape

_EXACT: Final = range(-(1 << 53), (1 << 53) + 1)
"""Integers that a float holds exactly."""

_CELLS: Final[Mapping[Kind, set[type]]] = {
    "free": {str},
    "json": set(),
    "text": {str},
    "boolean": {bool},
    "integer": {int},
    "number": {int, float},
    "list": {list},
    "struct": {dict},
}
"""Types of the values that a cell holds as they are."""

Fitted: TypeAlias = tuple[Json, bool]
"""A cell, and whether it holds all of the value."""


def fit_all(shape: Shape, values: Sequence[Json]) -> tuple[Sequence[Json], list[int]]:
    """Return the cells of a column, and the numbers of the values that they do not hold all of.

    Args:
        shape: The column's type.
        values: Any values read from JSON.
    """
    if _are_cells(shape, values):
        return values, []
    fitted = [fit(shape, value) for value in values]
    return [cell for cell, _ in fitted], [n for n, (_, fits) in enumerate(fitted) if not fits]


def _are_cells(shape: Shape, values: Sequence[Any]) -> bool:
    """Say whether all values are cells already, as nearly all are: Arrow takes them as they are.

    Looking at a column's types costs less than looking at its values one by one.
    """
    types = set(map(type, values)) - {NoneType}
    if not types <= _CELLS[shape.kind]:
        return False
    if int in types:
        bounds = INT64 if shape.kind == "integer" else _EXACT
        return all(value in bounds for value in values if value is not None and type(value) is int)
    present = [value for value in values if value is not None]
    if shape.kind == "list":
        return _are_cells(shape.parts[0][1], list(chain.from_iterable(present)))
    if shape.kind == "struct":
        names = {name for name, _ in shape.parts}
        return all(map(names.issuperset, present)) and all(
            _are_cells(part, [value.get(name) for value in present]) for name, part in shape.parts
        )
    return True


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
