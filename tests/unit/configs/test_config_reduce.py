from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.aggregators import (
    AggregatorConfig,
    AnyAggregatorConfig,
    check_aggregators,
    to_aggregator_spec,
)

ADAPTER: TypeAdapter[AggregatorConfig] = TypeAdapter(AnyAggregatorConfig)
SCHEMA: dict[str, Any] = {
    "$defs": {"unit": {"type": "number", "minimum": 0, "maximum": 2}},
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
    ],
    ids=str,
)
def test_stages_that_fit(stage: dict[str, Any]) -> None:
    check_aggregators([ADAPTER.validate_python(stage)], SCHEMA)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"op": "stats", "field": "nn"}, "no field 'nn'"),
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


def test_references_in_a_circle_end() -> None:
    circle = {"properties": {"x": {"$ref": "#/a"}}, "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}
    check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "x"})], circle)
    endless: dict[str, Any] = {"allOf": [{"$ref": "#"}]}
    with pytest.raises(ConfigurationError, match="no field"):
        check_aggregators([ADAPTER.validate_python({"op": "stats", "field": "x"})], endless)
