from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.aggregators import (
    AnyAggregatorConfig,
    check_aggregators,
    to_aggregator_spec,
)

ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyAggregatorConfig)
SCHEMA: dict[str, Any] = {
    "$defs": {
        "unit": {"type": "number", "minimum": 0, "maximum": 2},
        "kind": {"enum": ["ic50", "ki"]},
        "assay": {
            "type": "object",
            "properties": {
                "name": {"$ref": "#/$defs/kind"},
                "value": {"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]},
                "notes": {"type": "array", "items": {"type": "string"}},
                "sure": {"type": "boolean"},
            },
        },
    },
    "properties": {
        "n": {"type": "number"},
        "i": {"type": "integer", "minimum": 0, "maximum": 9},
        "maybe": {"type": ["number", "null"]},
        "either": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "s": {"type": "string"},
        "e": {"enum": ["a", "b"]},
        "many": {"enum": list(range(1001))},
        "b": {"type": "boolean"},
        "u": {"$ref": "#/$defs/unit"},
        "deep": {"properties": {"er": {"$ref": "#/$defs/unit"}}},
        "free": True,
        "text_or_none": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "label": {"anyOf": [{"$ref": "#/$defs/kind"}, {"type": "null"}]},
        "assays": {
            "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/assay"}}, {"type": "null"}]
        },
        "grid": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        "pair": {"type": "array", "prefixItems": [{"const": "p"}, {"const": 5}], "items": False},
    },
    "allOf": [{"properties": {"more": {"type": "number"}}}, True],
}


@pytest.mark.parametrize(
    "stage",
    [
        {"op": "count"},
        {"op": "stats", "field": "n"},
        {"op": "stats", "field": "maybe"},
        {"op": "stats", "field": "either"},
        {"op": "stats", "field": "deep.er"},
        {"op": "stats", "field": "free"},
        {"op": "stats", "field": "more"},
        {"op": "histogram", "field": "e"},
        {"op": "histogram", "field": "b"},
        {"op": "histogram", "field": "i"},
        {"op": "histogram", "field": "u", "bins": 4},
        {"op": "histogram", "field": "n", "bins": 4, "low": 0, "high": 1},
        {"op": "histogram", "field": "n", "bins": [0, 1, 2]},
        {"op": "top_k", "field": "i", "order": "smallest"},
        {"op": "collect"},
        {"op": "collect", "field": "s"},
        {"op": "histogram", "field": "label"},
        {"op": "histogram", "field": "assays[].name"},
        {"op": "histogram", "field": "output.assays[].sure"},
        {"op": "histogram", "field": "assays[].value", "bins": 4},
        {"op": "histogram", "field": "pair[]"},
        {"op": "stats", "field": "assays[].value"},
        {"op": "stats", "field": "grid[][]"},
        {"op": "top_k", "field": "assays[].value"},
        {"op": "collect", "field": "assays[].notes[]"},
        {"op": "collect", "field": "assays[]"},
        {"op": "count", "group_by": "e"},
        {"op": "stats", "field": "assays[].value", "group_by": "assays[].name"},
        {"op": "collect", "group_by": "s", "max_groups": 1000},
        {"op": "top_k", "field": "n", "group_by": "e", "k": 10_000},
    ],
    ids=str,
)
def test_stages_that_fit(stage: dict[str, Any]) -> None:
    check_aggregators([ADAPTER.validate_python(stage)], SCHEMA)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"op": "stats", "field": "output.nn"}, "no field 'nn'"),
        ({"op": "stats", "field": "deep.err"}, "did you mean 'er'"),
        ({"op": "stats", "field": "free.x"}, "no field 'free.x'"),
        ({"op": "stats", "field": "s"}, "is string"),
        ({"op": "top_k", "field": "s"}, "is string"),
        ({"op": "histogram", "field": "s"}, "unlimited"),
        ({"op": "histogram", "field": "n"}, "unlimited"),
        ({"op": "histogram", "field": "many"}, "more than 1000"),
        ({"op": "histogram", "field": "n", "bins": 3}, "low < high"),
        ({"op": "histogram", "field": "n", "bins": 3, "low": 1, "high": 1}, "low < high"),
        ({"op": "histogram", "field": "n", "bins": [1]}, "rising order"),
        ({"op": "histogram", "field": "n", "bins": [1, 1]}, "rising order"),
        ({"op": "stats", "field": "text_or_none"}, "is null/string in task.schema"),
        ({"op": "stats", "field": "assays[].name"}, "is string"),
        ({"op": "stats", "field": "grid[]"}, "is array"),
        ({"op": "stats", "field": "assays.value"}, "'assays' is a list; the values of its"),
        ({"op": "stats", "field": "assays.value"}, "are 'assays[].value'"),
        ({"op": "stats", "field": "assays[].valu"}, "did you mean 'value'?"),
        ({"op": "stats", "field": "n[]"}, "'n' is not a list"),
        ({"op": "collect", "field": "output[]"}, "'output' is not a list"),
        ({"op": "histogram", "field": "assays[].notes[]"}, "unlimited"),
        ({"op": "count", "group_by": "output.x"}, "group_by: task.schema has no field 'x'"),
        ({"op": "count", "group_by": "assays"}, "is a list; name a text, number or boolean in it"),
        ({"op": "count", "group_by": "assays[]"}, "is an object; name"),
        ({"op": "count", "group_by": "many", "max_groups": 1000}, "has 1,001 values"),
        ({"op": "count", "group_by": "e", "max_groups": 1}, "has 2 values; set max_groups to"),
        ({"op": "top_k", "field": "n", "group_by": "s", "k": 2000}, "lower k or max_groups"),
        ({"op": "collect", "group_by": "s", "limit": 2000}, "lower limit or max_groups"),
    ],
    ids=str,
)
def test_stages_that_do_not(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"reduce\.1 \({stage['op']}\)") as error:
        check_aggregators(map(ADAPTER.validate_python, [{"op": "count"}, stage]), SCHEMA)
    assert words in error.value.message


def test_bounds_come_from_the_schema() -> None:
    stage = ADAPTER.validate_python({"op": "histogram", "field": "u", "bins": 4, "low": 1})
    plain = to_aggregator_spec(stage, SCHEMA)
    assert (plain["low"], plain["high"]) == (1, 2)


@pytest.mark.parametrize(
    ("field", "categories"),
    [
        ("e", ["a", "b"]),
        ("label", ["ic50", "ki"]),
        ("assays[].name", ["ic50", "ki"]),
        ("pair[]", ["p", 5]),
        ("b", [False, True]),
        ("i", []),
        ("input.x", []),
    ],
)
def test_categories_come_from_the_schema(field: str, categories: list[Any]) -> None:
    plain = to_aggregator_spec(ADAPTER.validate_python({"op": "histogram", "field": field}), SCHEMA)
    assert plain["categories"] == categories


def test_types_of_alternatives() -> None:
    schema: dict[str, Any] = {
        "properties": {
            "x": {
                "allOf": [{"type": "number"}, {"type": ["integer", "null"]}, {"minimum": 1}],
                "anyOf": [{"maximum": 5}, {"maximum": 9}],
            },
            "y": {"allOf": [{"enum": [1, True, "a"]}, {"enum": ["a", 1]}]},
        }
    }
    check_aggregators([ADAPTER.validate_python({"op": "histogram", "field": "x"})], schema)
    plain = to_aggregator_spec(ADAPTER.validate_python({"op": "histogram", "field": "y"}), schema)
    assert plain["categories"] == [1, "a"]
    spec = ADAPTER.validate_python({"op": "histogram", "field": "x", "bins": 2})
    assert to_aggregator_spec(spec, schema)["high"] == 9


def test_many_alternatives_are_read_once() -> None:
    names = [f"#/$defs/{n}" for n in range(200)]
    every = {"anyOf": [{"$ref": name} for name in names], "allOf": [{"$ref": names[0]}]}
    schema = {"$defs": {str(n): dict(every) for n in range(200)}, "properties": {"x": every}}
    check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "x"})], schema)


def test_groups_come_from_the_schema() -> None:
    plain = to_aggregator_spec(
        ADAPTER.validate_python({"op": "count", "group_by": "output.assays[].name"}), SCHEMA
    )
    assert plain == {
        "op": "count",
        "group_by": "assays[].name",
        "max_groups": 100,
        "groups": ["ic50", "ki"],
    }
    assert "group_by" not in to_aggregator_spec(ADAPTER.validate_python({"op": "count"}), SCHEMA)


def test_references_in_a_circle_end() -> None:
    circle = {"properties": {"x": {"$ref": "#/a"}}, "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}
    check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "x"})], circle)
    endless: dict[str, Any] = {"allOf": [{"$ref": "#"}]}
    with pytest.raises(ConfigurationError, match="no field"):
        check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "output.x"})], endless)


INPUT: dict[str, Any] = {
    "properties": {
        "n": {"type": "integer"},
        "w": {"type": "number"},
        "smiles": {"type": "string"},
        "meta": {"properties": {"year": {"type": "integer"}}},
    }
}


@pytest.mark.parametrize(
    "stage",
    [
        {"op": "stats", "field": "w"},
        {"op": "stats", "field": "input.w"},
        {"op": "top_k", "field": "meta.year"},
        {"op": "stats", "field": "output.n"},
        {"op": "stats", "field": "input.n"},
        {"op": "histogram", "field": "input.w", "bins": 3, "low": 0, "high": 1},
        {"op": "collect", "field": "smiles"},
        {"op": "collect", "field": "output"},
    ],
    ids=str,
)
def test_columns_of_the_input(stage: dict[str, Any]) -> None:
    config = ADAPTER.validate_python(stage)
    check_aggregators([config], SCHEMA)
    check_aggregators([config], SCHEMA, INPUT)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"op": "stats", "field": "n"}, "write 'output.n' or 'input.n'"),
        ({"op": "stats", "field": "nn"}, "neither task.schema nor the input has a field 'nn'"),
        ({"op": "stats", "field": "smile"}, "did you mean 'smiles'?"),
        ({"op": "stats", "field": "meta.yaer"}, "the input has no column 'meta.yaer'"),
        ({"op": "stats", "field": "input.x"}, "(it has n, w, smiles, meta)"),
        ({"op": "stats", "field": "smiles"}, "is string in the input, not a number"),
        ({"op": "histogram", "field": "w"}, "a column of the input needs bins"),
    ],
    ids=str,
)
def test_columns_that_do_not_fit(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"reduce\.0 \({stage['op']}\)") as error:
        check_aggregators([ADAPTER.validate_python(stage)], SCHEMA, INPUT)
    assert words in error.value.message


def test_one_name_of_a_field_whatever_the_spelling() -> None:
    names = {"n": "n", "output.n": "n", "w": "input.w", "input.w": "input.w", "output": "output"}
    for given, name in names.items():
        config = ADAPTER.validate_python({"op": "collect", "field": given})
        assert to_aggregator_spec(config, SCHEMA)["field"] == name
    assert to_aggregator_spec(ADAPTER.validate_python({"op": "collect"}), SCHEMA)["field"] is None


def test_free_text_has_no_fields_but_the_input_has() -> None:
    check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "w"})], None, INPUT)
    with pytest.raises(ConfigurationError, match="a free-text answer has no fields"):
        check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "output.w"})], None)
    with pytest.raises(ConfigurationError, match="unlimited different values"):
        check_aggregators([ADAPTER.validate_python({"op": "histogram", "field": "output"})], None)
