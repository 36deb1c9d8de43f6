"""Columns of the results, with cells typed by the answer schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any, Final, Literal, TypeAlias

import orjson

from ..core.money import NANO_PER_USD
from ..core.parsing import resolve_reference
from ..core.types import Json

Kind: TypeAlias = Literal[
    "free", "json", "text", "integer", "number", "boolean", "list", "struct", "any"
]


@dataclass(frozen=True, slots=True)
class CellType:
    """Type of a cell; every cell may be null.

    Attributes:
        kind: ``free`` is text unchanged and anything else as JSON text; ``json`` always JSON text;
            ``any`` is a value that fits.
        parts: A struct's fields by name; a list's element, under ``element``.
    """

    kind: Kind
    parts: tuple[tuple[str, CellType], ...] = ()


FREE_TEXT: Final = CellType("free")
JSON: Final = CellType("json")
TEXT: Final = CellType("text")
INTEGER: Final = CellType("integer")
NUMBER: Final = CellType("number")
BOOLEAN: Final = CellType("boolean")

INT64: Final = range(-(1 << 63), 1 << 63)

_DEPTH: Final = 16
"""Nesting level below which everything is JSON text."""

_SCALARS: Final = {"string": TEXT, "number": NUMBER, "boolean": BOOLEAN}
_PYTHON: Final = {str: TEXT, int: INTEGER, float: NUMBER, bool: BOOLEAN}
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def read_cell_type(schema: Mapping[str, Json] | None) -> CellType:
    """Return the cell type of the answers that a schema allows.

    Args:
        schema: A JSON Schema, or None for free text.
    """
    return FREE_TEXT if schema is None else _Reader(schema).read(schema)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reader of one schema.

    Attributes:
        root: The whole schema, for local references.
        refs: References followed so far.
        depth: Nesting level.
    """

    root: Mapping[str, Json]
    refs: frozenset[str] = frozenset()
    depth: int = 0

    def read(self, schema: Json) -> CellType:
        if not isinstance(schema, Mapping) or self.depth > _DEPTH:
            return JSON
        if "$ref" in schema:
            return self._follow(schema["$ref"])
        if "type" in schema:
            return self._read_typed(schema)
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return self._read_union(schema[union], every=union == "allOf")
        listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
        return _common(_PYTHON.get(type(value), JSON) for value in listed if value is not None)

    def _follow(self, ref: Json) -> CellType:
        if not isinstance(ref, str) or not ref.startswith("#") or ref in self.refs:
            return JSON
        try:
            target = resolve_reference(self.root, ref)
        except LookupError:
            return JSON
        return _Reader(self.root, self.refs | {ref}, self.depth + 1).read(target)

    def _read_typed(self, schema: Mapping[str, Json]) -> CellType:
        declared = schema["type"]
        types = [declared] if isinstance(declared, str) else declared
        if not isinstance(types, Sequence):
            return JSON
        return _common(self._of_type(name, schema) for name in types if name != "null")

    def _of_type(self, name: Json, schema: Mapping[str, Json]) -> CellType:
        if name == "integer":
            return INTEGER if _within_int64(schema) else JSON
        if name == "array":
            return CellType("list", (("element", self._below(schema.get("items"))),))
        if name == "object":
            return self._object(schema)
        return _SCALARS.get(name, JSON) if isinstance(name, str) else JSON

    def _object(self, schema: Mapping[str, Json]) -> CellType:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return JSON
        # A missing additionalProperties also allows more, but is rarely meant that way.
        if schema.get("additionalProperties", False) is not False or "patternProperties" in schema:
            return JSON
        return CellType("struct", tuple((n, self._below(s)) for n, s in properties.items()))

    def _read_union(self, options: Json, *, every: bool) -> CellType:
        if not isinstance(options, Sequence) or (every and len(options) != 1):
            return JSON
        return _common(self._below(option) for option in options if not _is_null(option))

    def _below(self, schema: Json) -> CellType:
        return _Reader(self.root, self.refs, self.depth + 1).read(schema)


def _common(shapes: Iterable[CellType]) -> CellType:
    """Return the one type that holds all values, JSON text if there is none."""
    different = set(shapes)
    if different == {INTEGER, NUMBER}:
        return NUMBER
    return different.pop() if len(different) == 1 else JSON


def _is_null(schema: Json) -> bool:
    return isinstance(schema, Mapping) and (
        schema.get("type") in ("null", ["null"]) or ("const" in schema and schema["const"] is None)
    )


def _within_int64(schema: Mapping[str, Json]) -> bool:
    """Return True if no bound exceeds 64 bits; without bounds, 64 bits are assumed to be enough."""
    bounds = [schema[name] for name in _BOUNDS if isinstance(schema.get(name), int | float)]
    return all(INT64[0] <= bound <= INT64[-1] for bound in bounds)


ResultRow: TypeAlias = Mapping[str, Json]
"""Row of the results; missing columns are null."""

RESULT_COLUMNS: Final = (
    "id",
    "status",
    "output",
    "error_class",
    "error",
    "reasoning",
    "endpoint",
    "model",
    "attempts",
    "repairs",
    "reused",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "wasted_tokens",
    "usd",
    "latency_s",
    "finished_at",
    "simulated",
    "fingerprint",
)
"""Columns in order."""

OPTIONAL_COLUMNS: Final = ("prompt", "raw")
"""Columns on request: the rendered messages, and the text of the answer where it was kept."""

UNFIT_COLUMN: Final = "output_unfit"
"""Last column if a schema gives the output typed columns: the whole output as JSON text where the
columns cannot hold all of it (an undeclared property, an integer beyond 64 bits), else null."""


INPUT_ROW: Final = "row"
"""Key of the input's columns in a :data:`ResultRow`."""

TIES: Final = "ties"
"""Key of the names of the fields on which the samples of a row do not agree, not in results."""

ROW_BYTES: Final = "row_bytes"
"""Key of their size in bytes."""

_RENAMED: Final = "input_"


def name_input_columns(
    columns: Sequence[str], id_column: str | None = None, further: Sequence[str] = ()
) -> dict[str, str]:
    """Return the names of the input's columns in the results, in order.

    A column keeps its name unless the results have, or may have, a column of that name.

    Args:
        columns: The columns of the input.
        id_column: Column whose texts are the ids; if it is called ``id``, it is not repeated.
        further: Names of further columns of these results.
    """
    left_out = "id" if id_column == "id" else None
    names = {name: name for name in columns if name != left_out}
    taken = {name for name in names if not _is_reserved(name, further)}
    for column in [name for name in names if name not in taken]:
        name = _RENAMED + column
        while name in taken:
            name = _RENAMED + name
        taken.add(name)
        names[column] = name
    return names


def _is_reserved(name: str, further: Sequence[str]) -> bool:
    # A name with a dot would be read as that of a field of the answer.
    return (
        name in _RESERVED
        or name in further
        or name.startswith(("output.", *(f"{column}." for column in further)))
    )


_RESERVED: Final = frozenset({*RESULT_COLUMNS, *OPTIONAL_COLUMNS, UNFIT_COLUMN})


def make_rows(records: Iterable[ResultRow], *, priced: bool) -> Iterator[ResultRow]:
    """Yield rows for journal records, with the cost of an item instead of its components.

    Args:
        records: Journal records, in the order of the rows.
        priced: Whether tokens have a price; otherwise the cost of an item is unknown.
    """
    for record in records:
        yield {
            **record,
            "attempts": record.get("requests"),
            "attempt_log": record.get("attempts"),
            "wasted_tokens": _wasted(record),
            "usd": _usd(record) if priced else None,
            "pieces": len(record.get("pieces") or ()) or None,
        }


def _wasted(record: ResultRow) -> int | None:
    """Return tokens that may be billed without use: failed, hedged, sent back for repair."""
    useful = record.get("useful_tokens")
    return None if useful is None else _tokens(record) - int(useful)


def _tokens(record: ResultRow) -> int:
    get = record.get
    return (get("prompt_tokens") or 0) + (get("completion_tokens") or 0) + (get("lost_tokens") or 0)


def _usd(record: ResultRow) -> float | None:
    nano = record.get("nano_usd")
    asked_without_price = nano == 0 and _tokens(record) > 0
    return None if nano is None or asked_without_price else nano / NANO_PER_USD


def to_compact_json(value: Json) -> str:
    """Return a value as compact JSON."""
    return orjson.dumps(value).decode()


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
"""Types of the values that a cell holds unchanged."""

FittedCell: TypeAlias = tuple[Json, bool]
"""A cell, and whether it holds all of the value."""


def fit_column(shape: CellType, values: Sequence[Json]) -> tuple[Sequence[Json], list[int]]:
    """Return the cells of a column, and the positions of values that they hold only in part.

    Args:
        shape: The column's type.
        values: Any values read from JSON.
    """
    if _are_cells(shape, values):
        return values, []
    fitted = [fit_cell(shape, value) for value in values]
    return [cell for cell, _ in fitted], [n for n, (_, fits) in enumerate(fitted) if not fits]


def _are_cells(shape: CellType, values: Sequence[Any]) -> bool:
    """Return True if all values already are cells, the usual case: Arrow takes them unchanged.

    Checking the types of a column costs less than checking its values one by one.
    """
    if shape.kind == "any":
        return True
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


def fit_cell(shape: CellType, value: Json) -> FittedCell:
    """Return the cell for a value.

    Args:
        shape: The cell's type.
        value: Any value read from JSON, allowed by the schema or not.

    Returns:
        The cell (null if it cannot hold the value), and whether it holds all of the value.
    """
    if value is None:
        return None, True
    if shape.kind == "list":
        return _list(shape.parts[0][1], value)
    if shape.kind == "struct":
        return _struct(shape, value)
    return _SCALARS_FITTING[shape.kind](value)


def _any(value: Json) -> FittedCell:
    return value, True


def _free(value: Json) -> FittedCell:
    return (value if isinstance(value, str) else to_compact_json(value)), True


def _json(value: Json) -> FittedCell:
    return to_compact_json(value), True


def _text(value: Json) -> FittedCell:
    return (value, True) if isinstance(value, str) else (None, False)


def _boolean(value: Json) -> FittedCell:
    return (value, True) if isinstance(value, bool) else (None, False)


def _integer(value: Json) -> FittedCell:
    """Convert 3.0 to 3, as JSON Schema does."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in INT64:
        return None, False
    return value, True


def _number(value: Json) -> FittedCell:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, False
    return float(value), True


def _list(element: CellType, value: Json) -> FittedCell:
    if not isinstance(value, list):
        return None, False
    fitted = [fit_cell(element, item) for item in value]
    return [cell for cell, _ in fitted], all(fits for _, fits in fitted)


def _struct(shape: CellType, value: Json) -> FittedCell:
    if not isinstance(value, Mapping):
        return None, False
    fitted = {name: fit_cell(part, value.get(name)) for name, part in shape.parts}
    whole = value.keys() <= fitted.keys() and all(fits for _, fits in fitted.values())
    return {name: cell for name, (cell, _) in fitted.items()}, whole


_SCALARS_FITTING: Final[Mapping[Kind, Callable[[Json], FittedCell]]] = {
    "any": _any,
    "free": _free,
    "json": _json,
    "text": _text,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
}
