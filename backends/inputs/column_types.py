"""Types of the input's columns: as the file declares them, or else as the values show them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import NoneType
from typing import Final, TypeAlias

import orjson
import pyarrow as pa

from ..core.arrow_text import is_read_as_text, parse_texts
from ..core.types import Json, Row

ArrowTypes: TypeAlias = Mapping[str, pa.DataType]
"""Types by column."""

_DEPTH: Final = 16
"""Nesting level below which everything is text."""

_MOST_KEYS: Final = 1_000
"""Keys of a nested object; an object with more is a mapping by name rather than a record."""

_EXACT: Final = 1 << 53
_INT64: Final = 1 << 63

_TAGS: Final[Mapping[type, str]] = {
    str: "text",
    bool: "boolean",
    float: "float",
    int: "integer",
    list: "list",
    dict: "object",
}
_INTEGERS: Final = frozenset({"integer", "negative", "inexact", "unsigned"})


class ValueTypes:
    """What kinds of values were seen in one place; the order of the values does not matter."""

    __slots__ = ("element", "fields", "tags")

    def __init__(self) -> None:
        self.tags: set[str] = set()
        self.element: ValueTypes | None = None
        self.fields: dict[str, ValueTypes] = {}

    def add(self, values: Sequence[Json], depth: int = 0) -> None:
        """Add values of this place.

        Args:
            values: The values.
            depth: Nesting level of the place.
        """
        kinds = set(map(type, values))
        kinds.discard(NoneType)
        if not kinds <= _TAGS.keys():  # values in memory may be of other types, e.g. enums
            self.add(orjson.loads(orjson.dumps(values)), depth)
            return
        self.tags.update(_TAGS[kind] for kind in kinds)
        if int in kinds:
            self._add_integers([value for value in values if type(value) is int])
        if list in kinds:
            self._add_lists([value for value in values if type(value) is list], depth)
        if dict in kinds:
            self._add_objects([value for value in values if type(value) is dict], depth)

    def _add_integers(self, values: Sequence[int]) -> None:
        least, most = min(values), max(values)
        if least < 0:
            self.tags.add("negative")
        if least < -_EXACT or most > _EXACT:
            self.tags.add("inexact")
        if most >= _INT64:
            self.tags.add("unsigned")

    def _add_lists(self, values: Sequence[list[Json]], depth: int) -> None:
        if depth == _DEPTH:
            self.tags.add("text")
            return
        if self.element is None:
            self.element = ValueTypes()
        self.element.add(list(chain.from_iterable(values)), depth + 1)

    def _add_objects(self, values: Sequence[dict[str, Json]], depth: int) -> None:
        if "text" in self.tags:
            return
        names = dict.fromkeys(chain.from_iterable(values))
        if depth == _DEPTH or len(names.keys() | self.fields.keys()) > _MOST_KEYS:
            self.tags.add("text")
            self.fields.clear()
            return
        for name in names:
            found = self.fields.setdefault(name, ValueTypes())
            found.add([value.get(name) for value in values], depth + 1)

    def to_arrow(self) -> pa.DataType:
        """Return the type that holds all values; text if there is no other."""
        tags = self.tags
        if tags == {"boolean"}:
            return pa.bool_()
        if tags == {"list"} and self.element is not None:
            return pa.list_(self.element.to_arrow())
        if tags == {"object"} and self.fields:
            return pa.struct([(name, kind.to_arrow()) for name, kind in self.fields.items()])
        if tags and tags <= _INTEGERS and not {"negative", "unsigned"} <= tags:
            return pa.uint64() if "unsigned" in tags else pa.int64()
        if "float" in tags and tags <= {"float", "integer", "negative"}:
            return pa.float64()
        return pa.string()


class ColumnTypes:
    """The types of an input's columns."""

    def __init__(self, declared: ArrowTypes) -> None:
        """Start without rows.

        Args:
            declared: Types that the input declares.
        """
        self._declared = {
            name: usual for name, kind in declared.items() if (usual := _usual_type(kind))
        }
        self._seen: dict[str, ValueTypes] = {}

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Add rows of the input."""
        for name in dict.fromkeys(chain.from_iterable(rows)):
            values = [row.get(name) for row in rows]
            declared = self._declared.get(name)
            if declared is None:
                self._seen.setdefault(name, ValueTypes()).add(values)
            elif is_read_as_text(declared):
                try:
                    parse_texts(values, declared)
                except pa.ArrowInvalid:  # a date before the year 0, say
                    self._declared[name] = pa.string()

    def to_schema(self, columns: Iterable[str]) -> pa.Schema:
        """Return the columns with their types, in the given order."""
        return pa.schema(
            [(name, self._declared.get(name) or self._seen[name].to_arrow()) for name in columns]
        )


def unify_types(parts: Iterable[ArrowTypes]) -> dict[str, pa.DataType]:
    """Return the types of the columns about which all parts of an input agree."""
    found: dict[str, pa.DataType] = {}
    differing = set[str]()
    for part in parts:
        differing |= {name for name, kind in part.items() if found.setdefault(name, kind) != kind}
    return {name: kind for name, kind in found.items() if name not in differing}


def describe_columns(schema: pa.Schema) -> dict[str, Json]:
    """Return the JSON Schema of rows with these columns; each may be null."""
    return {
        "type": "object",
        "properties": {field.name: describe_type(field.type) for field in schema},
    }


def describe_type(kind: pa.DataType) -> dict[str, Json]:
    """Return the JSON Schema of values of a type."""
    if pa.types.is_boolean(kind):
        return {"type": "boolean"}
    if pa.types.is_integer(kind):
        return {"type": "integer"}
    if pa.types.is_floating(kind):
        return {"type": "number"}
    if pa.types.is_struct(kind):
        parts = {field.name: describe_type(field.type) for field in kind}
        return {"type": "object", "properties": parts}
    if pa.types.is_nested(kind):
        return {"type": "array", "items": describe_type(kind.field(0).type)}
    return {"type": "string"}


def encode_schema(schema: pa.Schema) -> str:
    """Return a schema as text."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def decode_schema(text: str) -> pa.Schema:
    """Return the schema of a text from :func:`encode_schema`.

    Raises:
        ValueError: The text is no schema.
    """
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def _usual_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type as which a declared one is kept; None if its values decide."""
    if isinstance(kind, pa.DictionaryType):
        return _usual_type(kind.value_type)
    if pa.types.is_nested(kind):
        return _usual_nested(kind)
    if pa.types.is_null(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return pa.float32() if pa.types.is_float16(kind) else kind


def _usual_nested(kind: pa.DataType) -> pa.DataType | None:
    parts = [
        (kind.field(at).name, _usual_type(kind.field(at).type)) for at in range(kind.num_fields)
    ]
    known = [(name, part) for name, part in parts if part is not None]
    if pa.types.is_map(kind) or len(known) < len(parts):
        return None
    if pa.types.is_struct(kind):
        return pa.struct(known)
    (_, element), *_ = known
    return pa.large_list(element) if pa.types.is_large_list(kind) else pa.list_(element)
