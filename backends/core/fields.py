"""Names of fields: ``output.score`` of the answer, ``input.smiles`` of the input."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
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
_DEEPEST: Final = 9
"""Maximum depth of alternatives in which a field is searched."""
_SHOWN: Final = 30
"""Names that a message lists."""


@dataclass(frozen=True, slots=True)
class FieldPath:
    """A field of the answer or of the input.

    Attributes:
        source: Where it is.
        keys: Keys down to the value; none for the whole answer.
    """

    source: Source
    keys: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> FieldPath:
        """Return the field of a name; without ``output.`` or ``input.`` it is in the answer."""
        first, *rest = name.split(".")
        for source in _SOURCES:
            if first == source:
                return cls(source, tuple(rest))
        return cls("output", (first, *rest))

    def __str__(self) -> str:
        """Return the shortest name from which :meth:`parse` returns this field."""
        if self.source == "output" and self.keys and self.keys[0] not in _SOURCES:
            return ".".join(self.keys)
        return ".".join((self.source, *self.keys))

    def pick(self, output: Json, row: Row) -> Json:
        """Return the value of an item, or None if it has none.

        Args:
            output: The answer.
            row: The columns of the input, whose names may contain dots.
        """
        if self.source == "output":
            return _walk(output, self.keys)
        found = split_column(".".join(self.keys), row)
        return None if found is None else _walk(row[found[0]], found[1])


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


def resolve_field(
    name: str, answer: Schema | None, inputs: Schema | None = None
) -> tuple[FieldPath, Schema]:
    """Return the field that a name means, and the schema of its values.

    ``output.NAME`` is a field of the answer, ``output`` the whole answer, and ``input.NAME`` a
    column of the input. Any other name is a field of the answer or a column of the input,
    whichever has it.

    Args:
        name: The name; dots lead to fields inside another one.
        answer: Schema of the answers; None for free text.
        inputs: Schema of the input's rows; None if it is not known yet: then a name that the answer
            does not have is one of the input.

    Raises:
        ConfigurationError: Neither has the field, or both; lists the names that exist.
    """
    path = FieldPath.parse(name)
    schemas: dict[Source, Schema | None] = {
        "output": _FREE_TEXT if answer is None else answer,
        "input": inputs,
    }
    if name.partition(".")[0] in _SOURCES:
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


def _find(path: FieldPath, root: Schema | None) -> Schema | None:
    """Return the schema of a field, or None if there is no such field."""
    if root is None:  # of an input that is not known yet
        return {} if path.keys else None
    if path.source == "input":
        columns = find_properties(root)
        found = split_column(".".join(path.keys), columns)
        return None if found is None else _descend(columns[found[0]], found[1], root)
    return _descend(root, path.keys, root)


def _descend(schema: Any, keys: Sequence[str], root: Schema) -> Schema | None:
    for key in keys:
        properties = find_properties(schema, root)
        if key not in properties:
            return None
        schema = properties[key]
    return follow_references(schema, root)


def find_properties(schema: Any, root: Schema | None = None) -> dict[str, Any]:
    """Return the properties of an object's schema, those of its alternatives included.

    Alternatives may refer to each other in cycles; each is visited once, the nearest first.

    Args:
        schema: The schema.
        root: The whole schema, for references; None if it is the same.
    """
    root = schema if root is None else root
    found: dict[str, Any] = {}
    seen, level = set[int](), [follow_references(schema, root)]
    for _ in range(_DEEPEST):
        fresh = {id(one): one for one in level if id(one) not in seen}
        seen |= fresh.keys()
        level = []
        for one in fresh.values():
            found = dict(one.get("properties", {})) | found
            members = (m for key in ("allOf", "anyOf", "oneOf") for m in one.get(key, ()))
            level += [follow_references(member, root) for member in members]
    return found


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
        return f"field {'.'.join(path.keys)!r} needs task.schema; a free-text answer has no fields"
    if not path.keys:
        return f"'input' names no column; write input.NAME (it has {_list(find_properties(root))})"
    schema: Any = root
    properties = find_properties(schema, root)
    missing = ".".join(path.keys)
    for key in path.keys:
        properties = find_properties(schema, root)
        if key not in properties:
            missing = key
            break
        schema = properties[key]
    kind = "field" if path.source == "output" else "column"
    return (
        f"{_HOLDERS[path.source]} has no {kind} {'.'.join(path.keys)!r} "
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
            f"field {'.'.join(path.keys)!r} needs task.schema, since a free-text answer has no "
            f"fields, or a column of that name in the input (it has {_list(inputs)}){near}"
        )
    return (
        f"neither task.schema nor the input has a field {'.'.join(path.keys)!r} (task.schema has "
        f"{_list(answer)}; the input has {_list(inputs)}){near}"
    )


def _list(names: Mapping[str, Any]) -> str:
    listed = ", ".join(islice(names, _SHOWN)) or "none"
    return listed + (", …" if len(names) > _SHOWN else "")


def _hint(name: str, names: Mapping[str, Any]) -> str:
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
