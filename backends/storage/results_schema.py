"""What a table's cell can hold of the values that a JSON Schema allows.

The shape is worked out once, from the schema alone, so that no value met later can change it.
Where a schema leaves the type open (no type, several, a union, free properties), the cell holds
JSON text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote

from ..core.types import Json

Kind: TypeAlias = Literal["free", "json", "text", "integer", "number", "boolean", "list", "struct"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A type of cells; every cell may be null.

    Attributes:
        kind: ``free`` is text as it is and anything else as JSON text, ``json`` always JSON text.
        parts: A struct's fields by name; a list's element, under ``element``.
    """

    kind: Kind
    parts: tuple[tuple[str, Shape], ...] = ()


FREE: Final = Shape("free")
JSON: Final = Shape("json")
TEXT: Final = Shape("text")
INTEGER: Final = Shape("integer")
NUMBER: Final = Shape("number")
BOOLEAN: Final = Shape("boolean")

INT64: Final = range(-(1 << 63), 1 << 63)

_DEPTH: Final = 16
"""Levels below which all is JSON text."""

_SCALARS: Final = {"string": TEXT, "number": NUMBER, "boolean": BOOLEAN}
_PYTHON: Final = {str: TEXT, int: INTEGER, float: NUMBER, bool: BOOLEAN}
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def shape_of(schema: Mapping[str, Json] | None) -> Shape:
    """Return the shape of the answers that a schema allows.

    Args:
        schema: A JSON Schema, or None for free text.
    """
    return FREE if schema is None else _Reader(schema).read(schema)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one schema.

    Attributes:
        root: The whole schema, where local references lead.
        refs: References followed on the way here.
        depth: Levels above.
    """

    root: Mapping[str, Json]
    refs: frozenset[str] = frozenset()
    depth: int = 0

    def read(self, schema: Json) -> Shape:
        if not isinstance(schema, Mapping) or self.depth > _DEPTH:
            return JSON
        if "$ref" in schema:
            return self._follow(schema["$ref"])
        if "type" in schema:
            return self._typed(schema)
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return self._united(schema[union], every=union == "allOf")
        listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
        return _common(_PYTHON.get(type(value), JSON) for value in listed if value is not None)

    def _follow(self, ref: Json) -> Shape:
        if not isinstance(ref, str) or not ref.startswith("#") or ref in self.refs:
            return JSON
        target: Json = self.root
        for token in unquote(ref[1:]).split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        return _Reader(self.root, self.refs | {ref}, self.depth + 1).read(target)

    def _typed(self, schema: Mapping[str, Json]) -> Shape:
        declared = schema["type"]
        types = [declared] if isinstance(declared, str) else declared
        if not isinstance(types, Sequence):
            return JSON
        return _common(self._of_type(name, schema) for name in types if name != "null")

    def _of_type(self, name: Json, schema: Mapping[str, Json]) -> Shape:
        if name == "integer":
            return INTEGER if _within_int64(schema) else JSON
        if name == "array":
            return Shape("list", (("element", self._below(schema.get("items"))),))
        if name == "object":
            return self._object(schema)
        return _SCALARS.get(name, JSON) if isinstance(name, str) else JSON

    def _object(self, schema: Mapping[str, Json]) -> Shape:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return JSON
        # An unsaid additionalProperties allows more, too, but is seldom meant.
        if schema.get("additionalProperties", False) is not False or "patternProperties" in schema:
            return JSON
        return Shape("struct", tuple((n, self._below(s)) for n, s in properties.items()))

    def _united(self, options: Json, *, every: bool) -> Shape:
        if not isinstance(options, Sequence) or (every and len(options) != 1):
            return JSON
        return _common(self._below(option) for option in options if not _is_null(option))

    def _below(self, schema: Json) -> Shape:
        return _Reader(self.root, self.refs, self.depth + 1).read(schema)


def _common(shapes: Iterable[Shape]) -> Shape:
    """Return the one shape that holds all, JSON text where there is none."""
    different = set(shapes)
    if different == {INTEGER, NUMBER}:
        return NUMBER
    return different.pop() if len(different) == 1 else JSON


def _is_null(schema: Json) -> bool:
    return isinstance(schema, Mapping) and (
        schema.get("type") in ("null", ["null"]) or ("const" in schema and schema["const"] is None)
    )


def _within_int64(schema: Mapping[str, Json]) -> bool:
    """Say whether no bound reaches beyond 64 bits; without bounds, 64 bits are taken to do."""
    bounds = [schema[name] for name in _BOUNDS if isinstance(schema.get(name), int | float)]
    return all(INT64[0] <= bound <= INT64[-1] for bound in bounds)
