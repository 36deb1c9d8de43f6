from __future__ import annotations

import pytest

from fanfold.backends.core.types import Json
from fanfold.backends.storage.results_schema import (
    BOOLEAN,
    FREE_TEXT,
    INTEGER,
    JSON,
    NUMBER,
    TEXT,
    CellType,
    read_cell_type,
)

INTEGERS = CellType("list", (("element", INTEGER),))
PAIR: dict[str, Json] = {"type": "object", "properties": {"a": {"type": "string"}, "b": {}}}


@pytest.mark.parametrize(
    ("schema", "shape"),
    [
        (None, FREE_TEXT),
        ({}, JSON),
        ({"type": "string"}, TEXT),
        ({"type": ["integer", "null"]}, INTEGER),
        ({"type": ["null"]}, JSON),
        ({"type": ["integer", "number"]}, NUMBER),
        ({"type": ["integer", "string"]}, JSON),
        ({"type": 7}, JSON),
        ({"type": "integer", "minimum": 0, "maximum": 10}, INTEGER),
        ({"type": "integer", "maximum": 2**63}, JSON),
        ({"type": "integer", "exclusiveMinimum": -1e30}, JSON),
        ({"enum": ["a", "b", None]}, TEXT),
        ({"enum": [1, 2]}, INTEGER),
        ({"enum": [1, 2.5]}, NUMBER),
        ({"enum": [True, False]}, BOOLEAN),
        ({"enum": [True, 1]}, JSON),
        ({"enum": [[1]]}, JSON),
        ({"const": "a"}, TEXT),
        ({"const": None}, JSON),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, INTEGER),
        ({"oneOf": [{"type": "integer"}, {"const": None}]}, INTEGER),
        ({"oneOf": [{"const": "a"}, {"const": "b"}]}, TEXT),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, JSON),
        ({"allOf": [{"type": "integer"}]}, INTEGER),
        ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, JSON),
        ({"anyOf": 3}, JSON),
        ({"type": "array", "items": {"type": "integer"}}, INTEGERS),
        ({"type": "array"}, CellType("list", (("element", JSON),))),
        (PAIR, CellType("struct", (("a", TEXT), ("b", JSON)))),
        (PAIR | {"additionalProperties": False}, CellType("struct", (("a", TEXT), ("b", JSON)))),
        (PAIR | {"additionalProperties": True}, JSON),
        (PAIR | {"additionalProperties": {"type": "string"}}, JSON),
        (PAIR | {"patternProperties": {"^x": {}}}, JSON),
        ({"type": "object"}, JSON),
        ({"type": "object", "properties": {}}, JSON),
        ({"properties": {"a": {"type": "string"}}}, JSON),
        ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "string"}}}, TEXT),
        ({"$ref": "#/$defs/absent"}, JSON),
        ({"$ref": "https://example.org/schema"}, JSON),
        ({"$ref": "#"}, JSON),
    ],
)
def test_shapes(schema: dict[str, Json] | None, shape: CellType) -> None:
    assert read_cell_type(schema) == shape


def test_a_schema_of_itself_ends_in_json_text() -> None:
    tree: dict[str, Json] = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "below": {"$ref": "#"}},
    }
    inner = CellType("struct", (("name", TEXT), ("below", JSON)))
    assert read_cell_type(tree) == CellType("struct", (("name", TEXT), ("below", inner)))


def test_deep_schemas_end_in_json_text() -> None:
    schema: dict[str, Json] = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    shape, levels = read_cell_type(schema), 0
    while shape.kind == "list":
        shape, levels = shape.parts[0][1], levels + 1
    assert shape == JSON
    assert levels < 20
