"""Names of fields: ``output.score`` of the answer, ``input.smiles`` of the input.

``assays[].name`` is the field ``name`` of every element of the list ``assays``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any, Final, Literal, TypeAlias

from .errors import ConfigurationError
from .types import Json, Row

Schema: TypeAlias = Mapping[str, Any]
"""A JSON Schema."""

Source: TypeAlias = Literal["output", "input"]
"""Where a field is: in the answer, or in the columns of the input."""

_SOURCES: Final[tuple[Source, ...]] = ("output", "input")
_FREE_TEXT: Final = {"type": "string"}
"""Schema of an answer without ``task.schema``."""
ELEMENTS: Final = "[]"
"""Key that leads to all elements of a list."""
_DEEPEST: Final = 9
"""Maximum depth of alternatives in which a field is searched."""
_SHOWN: Final = 30
"""Names that a message lists."""


@dataclass(frozen=True, slots=True)
class FieldPath:
    """A field of the answer or of the input.

    Attributes:
        source: Where it is.
        keys: Keys down to the value, ``ELEMENTS`` for those of a list; none for the whole answer.
    """

    source: Source
    keys: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> FieldPath:
        """Return the field of a name; without ``output.`` or ``input.`` it is in the answer."""
        first, *rest = _split_keys(name)
        for source in _SOURCES:
            if first == source:
                return cls(source, tuple(rest))
        return cls("output", (first, *rest))

    @property
    def is_many(self) -> bool:
        """Return True if an item may have several values, those of the elements of a list."""
        return ELEMENTS in self.keys

    def __str__(self) -> str:
        """Return the shortest name from which :meth:`parse` returns this field."""
        if self.source == "output" and self.keys and self.keys[0] not in (*_SOURCES, ELEMENTS):
            return _join_keys(self.keys)
        return _join_keys((self.source, *self.keys))

    def pick(self, output: Json, row: Row) -> Json:
        """Return the value of an item, or None if it has none; the values if it may have several.

        Args:
            output: The answer.
            row: The columns of the input, whose names may contain dots.
        """
        return self.pick_all(output, row) if self.is_many else self.pick_one(output, row)

    def pick_one(self, output: Json, row: Row) -> Json:
        """Do what :meth:`pick` does, for a field that is not in the elements of a list."""
        if self.source == "output":
            return _walk(output, self.keys)
        found = split_column(".".join(self.keys), row)
        return None if found is None else _walk(row[found[0]], found[1])

    def pick_all(self, output: Json, row: Row) -> list[Json]:
        """Return the values of an item, those of all elements of lists.

        Args:
            output: The answer.
            row: The columns of the input.
        """
        if self.source == "output":
            return list(_walk_all(output, self.keys))
        found = _split_elements(self.keys, row)
        return [] if found is None else list(_walk_all(row[found[0]], found[1]))

    def split(
        self, output: Json, row: Row, to_name: Callable[[Json], str]
    ) -> dict[str, tuple[Json, Row]]:
        """Split an item by the values of a field in the elements of lists.

        Args:
            output: The answer.
            row: The columns of the input.
            to_name: Returns the name of a value; elements of one name stay together.

        Returns:
            By name, answer and columns with only these elements in the lists on the path.
        """
        if self.source == "output":
            return {name: (part, row) for name, part in _split(output, self.keys, to_name).items()}
        found = _split_elements(self.keys, row)
        if found is None:
            return {}
        column, keys = found
        return {
            name: (output, {**row, column: part})
            for name, part in _split(row[column], keys, to_name).items()
        }


def _split_keys(name: str) -> Iterator[str]:
    for part in name.split("."):
        key = part
        while key.endswith(ELEMENTS):
            key = key.removesuffix(ELEMENTS)
        yield from (key, *[ELEMENTS] * ((len(part) - len(key)) // len(ELEMENTS)))


def _join_keys(keys: Sequence[str]) -> str:
    name = keys[0] if keys else ""
    for key in keys[1:]:
        name += key if key == ELEMENTS else f".{key}"
    return name


def _split_elements(
    keys: Sequence[str], columns: Container[str]
) -> tuple[str, tuple[str, ...]] | None:
    """Return what :func:`split_column` does, with ``ELEMENTS`` among the keys inside the column."""
    for count in range(len(keys), 0, -1):
        if (column := _join_keys(keys[:count])) in columns:
            return column, tuple(keys[count:])
    return None


def split_column(name: str, columns: Container[str]) -> tuple[str, tuple[str, ...]] | None:
    """Return the column that a name begins with, and the keys of the field inside it.

    A column may have dots in its name: the longest one counts, so that ``a.b`` is a column of that
    name rather than the field ``b`` of a column ``a``.

    Args:
        name: The name.
        columns: The columns that exist.

    Returns:
        None if there is no such column.
    """
    column, keys = name, tuple[str, ...]()
    while column not in columns:
        column, dot, key = column.rpartition(".")
        if not dot:
            return None
        keys = (key, *keys)
    return column, keys


def _walk(value: Json, keys: Sequence[str]) -> Json:
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _walk_all(value: Json, keys: Sequence[str]) -> Iterator[Json]:
    """Yield the values at the end of the keys; a missing field of an element is None."""
    for at, key in enumerate(keys):
        if key == ELEMENTS:
            for element in value if isinstance(value, list) else ():
                yield from _walk_all(element, keys[at + 1 :])
            return
        value = value.get(key) if isinstance(value, dict) else None
    yield value


def _split(value: Json, keys: Sequence[str], to_name: Callable[[Json], str]) -> dict[str, Json]:
    """Return, by the name of the value at the end of the keys, the elements that lead to it."""
    if not keys:
        return {to_name(value): value}
    key, rest = keys[0], keys[1:]
    if key == ELEMENTS:
        lists = dict[str, list[Json]]()
        for element in value if isinstance(value, list) else ():
            for name, part in _split(element, rest, to_name).items():
                lists.setdefault(name, []).append(part)
        return dict(lists)
    if isinstance(value, dict):
        parts = _split(value.get(key), rest, to_name)
        return {name: {**value, key: part} for name, part in parts.items()}
    return {} if ELEMENTS in rest else {to_name(None): value}


def resolve_field(
    name: str,
    answer: Schema | None,
    inputs: Schema | None = None,
    *,
    elements: bool = False,
) -> tuple[FieldPath, Schema]:
    """Return the field that a name means, and what its values are.

    ``output.NAME`` is a field of the answer, ``output`` the whole answer, and ``input.NAME`` a
    column of the input. Any other name is a field of the answer or a column of the input,
    whichever has it.

    Args:
        name: The name; dots lead to fields inside another one.
        answer: Schema of the answers; None for free text.
        inputs: Schema of the input's rows; None if it is not known yet: then a name that the answer
            does not have is one of the input.
        elements: Whether the name may lead into lists, ``assays[].name``.

    Returns:
        The field, and ``type``, ``enum``, ``minimum`` and ``maximum`` of its values as far as the
        schema says them, wherever it does: behind references and in alternatives.

    Raises:
        ConfigurationError: Neither has the field, or both; lists the names that exist.
    """
    path = FieldPath.parse(name)
    if path.is_many and not elements:
        raise ConfigurationError(
            f"{name!r} has a value for each element of a list, but here an item needs one value; "
            "name a field outside of lists"
        )
    schemas: dict[Source, Schema | None] = {
        "output": _FREE_TEXT if answer is None else answer,
        "input": inputs,
    }
    if next(_split_keys(name)) in _SOURCES:
        found = _find(path, schemas[path.source])
        if found is None:
            raise ConfigurationError(_describe_missing(path, schemas[path.source] or {}))
        return path, found
    candidates = [FieldPath(source, path.keys) for source in _SOURCES]
    if inputs is None and path.keys[0] in find_properties(schemas["output"]):
        candidates = candidates[:1]
    known = [
        (one, sub) for one in candidates if (sub := _find(one, schemas[one.source])) is not None
    ]
    if len(known) > 1:
        raise ConfigurationError(
            f"{name!r} is both a field of the answer and a column of the input; write "
            f"'output.{name}' or 'input.{name}'"
        )
    if not known:
        raise ConfigurationError(_describe_unknown(path, schemas))
    return known[0]


def split_elements(name: str, columns: Container[str]) -> tuple[str, tuple[str, ...]]:
    """Return the column that a name into lists begins with, and the keys inside the column.

    Args:
        name: The name, ``read.findings[]``.
        columns: The columns that exist.

    Raises:
        ConfigurationError: There is no such column.
    """
    found = _split_elements(tuple(_split_keys(name)), columns)
    if found is None:
        raise ConfigurationError(f"there is no column for {name!r}")
    return found


def pick_elements(name: str, row: Row) -> list[Json] | None:
    """Return the values in the elements of the lists that a name leads into.

    A missing or null list has none; a missing field of an element is None.

    Args:
        name: The name, ``read.findings[]``.
        row: The columns.

    Returns:
        The values; None if another value is where a list belongs.
    """
    found = _split_elements(tuple(_split_keys(name)), row)
    if found is None:
        return []
    column, keys = found
    at = keys.index(ELEMENTS)
    value = row[column]
    for key in keys[:at]:
        if value is not None and not isinstance(value, dict):
            return None
        value = None if value is None else value.get(key)
    if value is None:
        return []
    return list(_walk_all(value, keys[at:])) if isinstance(value, list) else None


def describe_elements(name: str, rows: Schema) -> Schema:
    """Return the JSON Schema of the values in the elements of lists.

    Args:
        name: The name, ``read.findings[]``.
        rows: JSON Schema of the rows; the schema of a column is complete in itself.

    Raises:
        ConfigurationError: The name does not lead into a list; says what there is.
    """
    path, columns = FieldPath("input", tuple(_split_keys(name))), find_properties(rows)
    found = _split_elements(path.keys, columns)
    if found is None:
        raise ConfigurationError(_describe_missing(path, rows))
    column, keys = found
    root = columns[column]
    schema, at = root, column
    for key in keys:
        step = _step(schema, key, root)
        if step is None:
            there = _list(find_properties(schema, root))
            what = f"{at!r} is not a list" if key == ELEMENTS else f"{at!r} has {there}"
            raise ConfigurationError(f"{name!r} leads to no list: {what}")
        schema, at = step[0], at + (key if key == ELEMENTS else f".{key}")
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return shared | dict(follow_references(schema, root))


def _find(path: FieldPath, root: Schema | None) -> Schema | None:
    """Return the schema of a field, or None if there is no such field."""
    if root is None:  # of an input that is not known yet
        return {} if path.keys else None
    if path.source == "input":
        columns = find_properties(root)
        found = _split_elements(path.keys, columns)
        return None if found is None else _descend(columns[found[0]], found[1], root)
    return _descend(root, path.keys, root)


def _descend(schema: Any, keys: Sequence[str], root: Schema) -> Schema | None:
    for key in keys:
        found = _step(schema, key, root)
        if found is None:
            return None
        schema = found[0]
    return _ValueReader(root).read(schema) or {}


def _step(schema: Any, key: str, root: Schema) -> tuple[Any] | None:
    """Return the schema behind a key, in a tuple; None if there is none."""
    if key == ELEMENTS:
        items = _find_items(schema, root)
        return (items[0] if len(items) == 1 else {"anyOf": items},) if items else None
    properties = find_properties(schema, root)
    return (properties[key],) if key in properties else None


def find_properties(schema: Any, root: Schema | None = None) -> dict[str, Any]:
    """Return the properties of an object's schema, those of its alternatives included.

    Alternatives may refer to each other in cycles; each is visited once, the nearest first.

    Args:
        schema: The schema.
        root: The whole schema, for references; None if it is the same.
    """
    root = schema if root is None else root
    found: dict[str, Any] = {}
    for one in _iter_alternatives(schema, root):
        found = dict(one.get("properties", {})) | found
    return found


def find_keywords(schema: Any, root: Schema) -> dict[str, Any]:
    """Return the keywords of a schema and of its alternatives, the nearest first."""
    found: dict[str, Any] = {}
    for one in _iter_alternatives(schema, root):
        found = {**one, **found}
    return found


def _find_items(schema: Any, root: Schema) -> list[Any]:
    """Return the schemas of a list's elements, one for each alternative; none if it is no list."""
    found = list[Any]()
    for one in _iter_alternatives(schema, root):
        first = one.get("prefixItems", ())
        found += first
        if "items" in one and not (first and one["items"] is False):
            found.append(one["items"])
        elif not first and "array" in list_types(one):
            found.append({})
    return found


def _iter_alternatives(schema: Any, root: Any) -> Iterator[Schema]:
    seen, level = set[int](), [follow_references(schema, root)]
    for _ in range(_DEEPEST):
        fresh = {id(one): one for one in level if id(one) not in seen}
        seen |= fresh.keys()
        level = []
        for one in fresh.values():
            yield one
            members = (m for key in ("allOf", "anyOf", "oneOf") for m in one.get(key, ()))
            level += [follow_references(member, root) for member in members]


_BOUNDS: Final = (("minimum", max, min), ("maximum", min, max))
"""Bounds, how they combine if all hold, and if one of them holds."""
_JSON_TYPES: Final[Mapping[type, str]] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


class _ValueReader:
    """Reads what the values of schemas are; each schema once, as they may refer to each other."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._read = dict[int, dict[str, Any] | None]()

    def read(self, schema: Any, depth: int = 0) -> dict[str, Any] | None:
        """Return type, enum and bounds; None for a schema that is only itself again."""
        one = follow_references(schema, self._root)
        if id(one) in self._read or depth > _DEEPEST:
            return self._read.get(id(one))
        self._read[id(one)] = None
        found = _read_own(one)
        for member in one.get("allOf", ()):
            found = _intersect(found, self.read(member, depth + 1))
        for key in ("anyOf", "oneOf"):
            members = [self.read(member, depth + 1) for member in one.get(key, ())]
            if known := [member for member in members if member is not None]:
                found = _intersect(found, _unite(known))
        self._read[id(one)] = found
        return found


def _read_own(schema: Schema) -> dict[str, Any]:
    found = {key: schema[key] for key in ("type", "enum", "minimum", "maximum") if key in schema}
    if "const" in schema:
        found["enum"] = [schema["const"]]
    if "enum" in found and "type" not in found:
        found["type"] = sorted({_JSON_TYPES.get(type(value), "string") for value in found["enum"]})
    return found


def list_types(schema: Schema) -> set[str]:
    """Return the types that a schema names; none if it allows every type."""
    declared = schema.get("type")
    return {declared} if isinstance(declared, str) else set(declared or ())


def _intersect(a: dict[str, Any], b: dict[str, Any] | None) -> dict[str, Any]:
    """Return what holds for values of both."""
    if not a or not b:
        return a or b or {}
    found = {**a, **b}
    if "type" in a and "type" in b:
        both_types = _widen(list_types(a)) & _widen(list_types(b))
        found["type"] = sorted(both_types - ({"integer"} if "number" in both_types else set()))
    if "enum" in a and "enum" in b:
        known = set(map(_to_key, b["enum"]))
        found["enum"] = [value for value in a["enum"] if _to_key(value) in known]
    return found | {key: both(a[key], b[key]) for key, both, _ in _BOUNDS if key in a and key in b}


def _widen(types: set[str]) -> set[str]:
    """Return the types with the integers among the numbers."""
    return types | ({"integer"} if "number" in types else set())


def _to_key(value: Json) -> str:
    """Return a key for a value; true is not 1."""
    return json.dumps(value, sort_keys=True, default=str)


def _unite(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what holds for values of any member; null is a type, but no value."""
    found = dict[str, Any]()
    if all("type" in one for one in members):
        found["type"] = sorted(set[str]().union(*map(list_types, members)))
    valued = [one for one in members if list_types(one) != {"null"}]
    if valued and all("enum" in one for one in valued):
        found["enum"] = list({_to_key(v): v for one in valued for v in one["enum"]}.values())
    return found | {
        key: either(one[key] for one in valued)
        for key, _, either in _BOUNDS
        if valued and all(key in one for one in valued)
    }


def follow_references(schema: Any, root: Any) -> Schema:
    """Follow a local ``$ref`` (``#/…``); ``true`` is a schema without rules."""
    seen: set[str] = set()
    found: Schema = schema if isinstance(schema, Mapping) else {}
    while isinstance(ref := found.get("$ref"), str) and ref.startswith("#/") and ref not in seen:
        seen.add(ref)
        target: Any = root
        for part in ref[2:].split("/"):
            target = target.get(part, {}) if isinstance(target, Mapping) else {}
        found = target if isinstance(target, Mapping) else {}
    return found


_HOLDERS: Final[Mapping[Source, str]] = {"output": "task.schema", "input": "the input"}


def _describe_missing(path: FieldPath, root: Schema) -> str:
    """Say which part of a path is missing, and what exists in its place."""
    if path.source == "output" and root == _FREE_TEXT:
        return (
            f"field {_join_keys(path.keys)!r} needs task.schema; a free-text answer has no fields"
        )
    if not path.keys:
        return f"'input' names no column; write input.NAME (it has {_list(find_properties(root))})"
    schema, at = root, 0
    while at + 1 < len(path.keys) and (found := _step(schema, path.keys[at], root)) is not None:
        schema, at = found[0], at + 1
    kind = "field" if path.source == "output" else "column"
    whole, missing = _join_keys(path.keys), path.keys[at]
    before = _join_keys(path.keys[:at]) or path.source
    if missing == ELEMENTS:
        return f"{_HOLDERS[path.source]} has no {kind} {whole!r}: {before!r} is not a list"
    properties = find_properties(schema, root)
    if not properties and _find_items(schema, root):
        rest = _join_keys(("", ELEMENTS, *path.keys[at:]))
        return (
            f"{_HOLDERS[path.source]} has no {kind} {whole!r}: {before!r} is a list; the values "
            f"of its elements are {before + rest!r}"
        )
    return (
        f"{_HOLDERS[path.source]} has no {kind} {whole!r} "
        f"(it has {_list(properties)}){_hint(missing, properties)}"
    )


def _describe_unknown(path: FieldPath, schemas: Mapping[Source, Schema | None]) -> str:
    """Say that neither the answer nor the input has a field, and what they have."""
    for source, root in schemas.items():  # a field inside one that exists
        if root is not None and path.keys[0] in find_properties(root):
            return _describe_missing(FieldPath(source, path.keys), root)
    answer, inputs = (find_properties(schemas[source] or {}) for source in _SOURCES)
    near = _hint(path.keys[0], {**answer, **inputs})
    if schemas["output"] == _FREE_TEXT:
        return (
            f"field {_join_keys(path.keys)!r} needs task.schema, since a free-text answer has no "
            f"fields, or a column of that name in the input (it has {_list(inputs)}){near}"
        )
    return (
        f"neither task.schema nor the input has a field {_join_keys(path.keys)!r} (task.schema has "
        f"{_list(answer)}; the input has {_list(inputs)}){near}"
    )


def _list(names: Mapping[str, Any]) -> str:
    listed = ", ".join(islice(names, _SHOWN)) or "none"
    return listed + (", …" if len(names) > _SHOWN else "")


def _hint(name: str, names: Mapping[str, Any]) -> str:
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
