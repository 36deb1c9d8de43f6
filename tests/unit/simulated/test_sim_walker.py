from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.simulated.requests import AnswerSchema, SchemaCache
from fanfold.backends.simulated.responders import dump_compact
from fanfold.backends.simulated.values import FORMATS, ApiError

Schema = dict[str, Any]
DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
NAMES = st.sampled_from(["score", "label", "why", "items", "a b", "ü", "$ref", ""])
JSON_VALUES = st.sampled_from([None, True, 0, -3, 2.5, "x", "ü", [1, "a"], {"k": None}])


@st.composite
def integers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-1000, 1000))
    high = low + draw(st.integers(20, 10**12))
    bounds: Schema = draw(
        st.sampled_from(
            [
                {},
                {"minimum": low},
                {"maximum": high},
                {"minimum": low, "maximum": high},
                {"exclusiveMinimum": low, "exclusiveMaximum": high},
            ]
        )
    )
    step = draw(st.sampled_from([None, 1, 3, 7, 0.5, 1.5]))
    return {"type": "integer", **bounds, **({} if step is None else {"multipleOf": step})}


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    low = draw(st.floats(-1e6, 1e6, allow_nan=False))
    width = draw(st.sampled_from([1e-9, 0.1, 1.0, 1e9]))
    bounds: Schema = draw(
        st.sampled_from(
            [
                {},
                {"minimum": low},
                {"exclusiveMaximum": low},
                {"minimum": low, "maximum": low},
                {"exclusiveMinimum": low, "maximum": low + width},
            ]
        )
    )
    return {"type": "number", **bounds}


@st.composite
def stepped_numbers(draw: st.DrawFn) -> Schema:
    step = draw(st.sampled_from([0.01, 0.1, 0.25, 2, 1e-3]))
    low = draw(st.integers(-50, 50))
    return {"type": "number", "multipleOf": step, "minimum": low, "maximum": low + 5}


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    least = draw(st.integers(0, 40))
    most = least + draw(st.integers(0, 40))
    choices: list[Schema] = [
        {},
        {"minLength": least},
        {"maxLength": most},
        {"minLength": least, "maxLength": most},
        {"pattern": r"^[A-Z]{2,4}-\d+$"},
        {"pattern": "(foo|bar)x?"},
        *({"format": name} for name in FORMATS),
    ]
    return {"type": "string", **draw(st.sampled_from(choices))}


LEAVES: st.SearchStrategy[Schema] = st.one_of(
    integers(),
    numbers(),
    stepped_numbers(),
    strings(),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, {"title": "Anything"}]),
    st.builds(lambda v: {"const": v}, JSON_VALUES),
    st.builds(lambda v: {"enum": v}, st.lists(JSON_VALUES, min_size=1, max_size=4)),
    st.sampled_from([{"type": ["string", "null"]}, {"type": ["integer", "boolean"]}]),
)


@st.composite
def objects(draw: st.DrawFn, parts: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(NAMES, parts, max_size=4))
    names = list(properties)
    required = draw(st.lists(st.sampled_from(names or ["more"]), unique=True))
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    if draw(st.booleans()):
        closed = bool(names) and draw(st.booleans())
        schema["additionalProperties"] = False if closed else {"type": "integer"}
    if draw(st.booleans()) and names:
        schema["minProperties"] = draw(st.integers(0, len(names)))
    return schema


@st.composite
def arrays(draw: st.DrawFn, parts: st.SearchStrategy[Schema]) -> Schema:
    least = draw(st.integers(0, 3))
    schema: Schema = {"type": "array", "items": draw(parts)}
    if draw(st.booleans()):
        schema |= {"minItems": least, "maxItems": least + draw(st.integers(0, 3))}
    elif draw(st.booleans()):
        schema = {"type": "array", "prefixItems": [draw(parts), draw(parts)], "items": False}
    elif draw(st.booleans()):
        schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 5}
    return schema


@st.composite
def branches(draw: st.DrawFn, parts: st.SearchStrategy[Schema]) -> Schema:
    choices = draw(st.lists(parts, min_size=1, max_size=3))
    return draw(
        st.sampled_from([{"anyOf": choices}, {"allOf": choices[:1]}, {"anyOf": [*choices, True]}])
    )


SCHEMAS = st.recursive(
    LEAVES, lambda parts: st.one_of(objects(parts), arrays(parts), branches(parts)), max_leaves=12
)


@given(schema=SCHEMAS, key=st.binary(max_size=8))
def test_answers_conform_and_are_repeatable(schema: Schema, key: bytes) -> None:
    answer = AnswerSchema(schema).draw(key)
    jsonschema_rs.validator_for(schema, validate_formats=True).validate(answer)
    assert dump_compact(AnswerSchema(schema).draw(key)) == dump_compact(answer)


@given(schema=SCHEMAS, key=st.binary(max_size=8))
def test_references_mean_what_they_name(schema: Schema, key: bytes) -> None:
    referring = {
        "type": "object",
        "properties": {"a~/b": {"$ref": "#/$defs/x~0~1y"}, "again": {"$ref": "#/$defs/x~0~1y"}},
        "required": ["a~/b"],
        "$defs": {"x~/y": schema},
    }
    answer = AnswerSchema(referring).draw(key)
    jsonschema_rs.validator_for(schema, validate_formats=True).validate(answer["a~/b"])


def test_keys_make_a_difference() -> None:
    schema = AnswerSchema({"type": "integer", "minimum": 0, "maximum": 10**9})
    assert len({schema.draw(b"%d" % n) for n in range(50)}) == 50


def test_a_tree_ends() -> None:
    tree: Schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                    "others": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["name", "left"],
            }
        },
    }
    schema = AnswerSchema(tree)
    for n in range(30):
        assert schema.accepts(schema.draw(b"%d" % n))


def test_oneof_draws_again_until_one_branch_matches() -> None:
    schema = AnswerSchema({"oneOf": [{"type": "integer"}, {"type": "number", "maximum": 5}]})
    assert all(schema.accepts(schema.draw(b"%d" % n)) for n in range(30))


def test_optional_fields_come_and_go() -> None:
    schema = AnswerSchema({"type": "object", "properties": {"a": {"type": "null"}}})
    assert {len(schema.draw(b"%d" % n)) for n in range(30)} == {0, 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"if": {}, "then": {}},
        {"type": "object", "patternProperties": {"^a": {}}},
        {"type": "array", "contains": {"type": "string"}},
        {"type": "object", "properties": {"deep": {"dependentRequired": {"a": ["b"]}}}},
        {"type": "string", "format": "iri"},
        {"type": "string", "pattern": "(?=look)"},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "#/$defs/missing"},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "objct"},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "string", "minLength": 5, "maxLength": 4},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "uniqueItems": True},
        {"allOf": [{"pattern": "a"}, {"pattern": "b"}]},
        {"properties": 5},
        {"enum": []},
        {"$schema": "https://example.org/meta"},
        {"$ref": "#"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"allOf": [{"items": False}, {"items": True, "type": "array", "minItems": 1}]},
        {"allOf": [{}, False]},
        {"type": "array", "prefixItems": [{}, {"not": {}}]},
        {"$schema": DRAFT_7, "items": [{"type": "string"}]},
        {"$schema": DRAFT_4, "minimum": 0, "exclusiveMinimum": True},
        False,
        5,
        None,
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(schema: Any) -> None:
    with pytest.raises(ApiError) as caught:
        AnswerSchema(schema).draw(b"key")
    assert (caught.value.status, caught.value.param) == (400, "response_format")


@given(schema=SCHEMAS, key=st.binary(max_size=4))
def test_broken_answers_break_the_schema(schema: Schema, key: bytes) -> None:
    ready = AnswerSchema({"type": "object", "properties": {"x": schema}, "required": ["x"]})
    assert not ready.accepts(ready.draw_invalid(key))


def test_nothing_breaks_a_schema_that_accepts_all() -> None:
    with pytest.raises(ApiError, match="accepts everything"):
        AnswerSchema({}).draw_invalid(b"")


def test_the_cache_keeps_the_newest() -> None:
    cache = SchemaCache(size=2)
    first = cache.get({"const": 1})
    assert cache.get({"const": 1}) is first
    cache.get({"const": 2})
    cache.get({"const": 3})
    assert cache.get({"const": 1}) is not first


def test_annotations_are_ignored() -> None:
    schema = {"type": "integer", "title": "N", "x-order": 3, "default": "none", "examples": [1]}
    assert isinstance(AnswerSchema(schema).draw(b""), int)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"allOf": [{"type": "number"}, {"type": ["integer", "string"], "enum": [1]}]}, 1),
        ({"allOf": [{"type": ["null", "string"]}, {"type": ["null", "integer"]}]}, None),
        ({"type": "string", "allOf": [{"title": "x"}, True], "title": "y", "maxLength": 0}, ""),
        ({"anyOf": [{"const": 1}, {"const": 1}], "allOf": [{"anyOf": [{}]}]}, 1),
        ({"properties": {"a": True}, "allOf": [{"properties": {"a": {"const": 1}}}]}, {"a": 1}),
        ({"$ref": "#/prefixItems/0", "prefixItems": [{"const": 1}]}, 1),
    ],
    ids=str,
)
def test_joined_schemas(schema: Schema, expected: Any) -> None:
    drawn = [AnswerSchema(schema).draw(b"%d" % n) for n in range(10)]
    assert expected in drawn


def test_joined_schemas_hold_both() -> None:
    schema: Schema = {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "number", "minimum": 3}}},
            {"properties": {"a": {"maximum": 4}, "b": {"enum": [1, 2]}}, "required": ["a"]},
            {"properties": {"b": {"enum": [2, 3]}}, "required": ["b"]},
        ]
    }
    answer = AnswerSchema(schema).draw(b"")
    assert 3 <= answer["a"] <= 4
    assert answer["b"] == 2
