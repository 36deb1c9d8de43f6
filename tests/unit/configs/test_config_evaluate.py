"""Section ``evaluate``: which fields can be compared, and how values are read as labels."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.templates import ItemPrompt
from fanfold.configs.evaluation import (
    is_in_prompt,
    read_number,
    resolve_evaluation,
)
from fanfold.configs.loader import load_config

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "decision": {"type": "string", "enum": ["yes", "no", "maybe"]},
        "toxic": {"type": ["boolean", "null"]},
        "grade": {"type": "integer", "enum": [1, 2, 3]},
        "score": {"type": "number"},
        "word": {"type": "string"},
        "any": {},
        "tags": {"type": "array", "items": {"type": "string"}},
        "deep": {"type": "object", "properties": {"label": {"type": "string"}}},
        "odd": {"enum": ["a", 1, None]},
        "maybe": {"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}]},
        "parts": {"type": "array", "items": {"properties": {"name": {"type": "string"}}}},
    },
    "$defs": {"Kind": {"enum": ["x", "y"]}},
}
INPUTS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "value": {"type": "number"},
        "meta": {"type": "object", "properties": {"gold": {"type": "string"}}},
        "list": {"type": "array"},
        "a.b": {"type": "string"},
    },
}
GOOD = {"gold": "label", "field": "decision"}


def load(evaluate: Any, **more: Any) -> Any:
    task = {"prompt": "Judge {text}", "schema": SCHEMA}
    settings = {"task": task, "endpoints": {"simulated": {}}, "evaluate": evaluate}
    return load_config(settings | more, environment={"COLUMN": "label"})


def test_one_comparison_or_several() -> None:
    one = load(GOOD)
    assert one.plain["evaluate"] == [GOOD]
    assert load([GOOD, GOOD | {"field": "output.toxic"}]).config.evaluate[1].field == "output.toxic"
    assert "evaluate" not in load(None).plain
    variable = load(GOOD | {"gold": "${COLUMN}"})
    assert variable.plain["evaluate"][0]["gold"] == "${COLUMN}"
    assert variable.config.evaluate[0].gold == "label"


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"gold": "label"}, "the key 'evaluate.0.field' is missing"),
        ([GOOD | {"feld": 1}], "unknown key 'evaluate.0.feld'; did you mean 'field'?"),
        (GOOD | {"gold": ""}, "evaluate.0.gold: must not be empty"),
        ("label", "evaluate: input should be a valid list"),
        (GOOD | {"field": "decison"}, "did you mean 'decision'?"),
        (GOOD | {"field": "input.label"}, "is a column of the input; name a field of the answer"),
        (GOOD | {"field": "tags"}, "field 'tags' is array in task.schema"),
        (GOOD | {"field": "parts[].name"}, "has a value for each element of a list"),
        (GOOD | {"field": "output"}, "field 'output' is object in task.schema"),
        ([GOOD, GOOD | {"field": "output.decision"}], "is compared with 'label' twice"),
    ],
)
def test_mistakes_are_named(evaluate: Any, words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(evaluate)
    assert words in error.value.message


def test_requests_in_openais_format_have_no_fields() -> None:
    given = {"input": {"path": "x.jsonl", "format": "openai_batch"}, "evaluate": [GOOD]}
    with pytest.raises(ConfigurationError, match="evaluate compares fields of answers"):
        load_config(given | {"endpoints": {"simulated": {}}})


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ("labels", "the input has no column 'labels'"),
        ("list", "the gold column 'list' has values of type array"),
        ("meta", "the gold column 'meta' has values of type object"),
        ("meta.golden", "has no column"),
    ],
)
def test_gold_columns_that_do_not_fit(gold: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve_evaluation(gold, "decision", SCHEMA, INPUTS)
    assert words in error.value.message


@pytest.mark.parametrize(
    ("gold", "field", "kind", "labels"),
    [
        ("label", "decision", "categorical", ("yes", "no", "maybe")),
        ("input.label", "output.toxic", "categorical", ("true", "false")),
        ("label", "grade", "categorical", ("1", "2", "3")),
        ("label", "odd", "categorical", ("a", "1")),
        ("label", "maybe", "categorical", ("x", "y")),
        ("label", "score", "numeric", None),
        ("label", "word", "categorical", None),
        ("value", "any", "numeric", None),
        ("label", "any", "categorical", None),
        ("meta.gold", "deep.label", "categorical", None),
        ("a.b", "word", "categorical", None),
    ],
)
def test_the_field_decides_what_is_compared(gold: str, field: str, kind: str, labels: Any) -> None:
    found = resolve_evaluation(gold, field, SCHEMA, INPUTS)
    assert (found.kind, found.labels) == (kind, labels)
    assert found.field_name == f"output.{field.removeprefix('output.')}"


def test_free_text_is_compared_as_a_whole() -> None:
    assert resolve_evaluation("label", "output", None, INPUTS).field_name == "output"
    with pytest.raises(ConfigurationError, match=r"needs task\.schema"):
        resolve_evaluation("label", "decision", None, INPUTS)


@pytest.mark.parametrize(
    ("field", "value", "label"),
    [
        ("decision", " yes ", "yes"),
        ("decision", "Yes", "Yes"),
        ("decision", "", None),
        ("decision", None, None),
        ("decision", ["yes"], None),
        ("decision", True, "true"),
        ("decision", "1.0", "1.0"),
        ("toxic", True, "true"),
        ("toxic", "True", "true"),
        ("toxic", "FALSE", "false"),
        ("toxic", 1, "true"),
        ("toxic", "0.0", "false"),
        ("toxic", "2", "2"),
        ("toxic", "toxic", "toxic"),
        ("grade", 1, "1"),
        ("grade", 1.0, "1"),
        ("grade", "1.0", "1"),
        ("grade", " 2", "2"),
        ("grade", "two", "two"),
        ("word", 1.5, "1.5"),
    ],
)
def test_gold_values_as_labels(field: str, value: Any, label: str | None) -> None:
    found = resolve_evaluation("label", field, SCHEMA, INPUTS)
    assert found.read_label(value, is_gold=True) == label


def test_answers_are_not_reinterpreted() -> None:
    found = resolve_evaluation("label", "odd", SCHEMA, INPUTS)
    assert found.read_label("1.0") == "1.0"
    assert resolve_evaluation("label", "toxic", SCHEMA, INPUTS).read_label("True") == "True"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (2, 2.0),
        ("-1.5e3", -1500.0),
        (" 7 ", 7.0),
        ("nan", None),
        ("inf", None),
        (True, None),
        ("x", None),
        ("", None),
        (None, None),
        ([1], None),
        (10**400, None),
    ],
)
def test_numbers(value: Any, number: float | None) -> None:
    assert read_number(value) == number


def test_gold_values_inside_columns() -> None:
    found = resolve_evaluation("input.meta.gold", "word", SCHEMA, INPUTS)
    assert found.pick_gold({"meta": {"gold": "x"}}) == "x"
    assert found.pick_gold({"meta": None}) is None
    assert found.pick_gold({"other": 1}) is None
    assert resolve_evaluation("a.b", "word", SCHEMA, INPUTS).pick_gold({"a.b": "y"}) == "y"


@pytest.mark.parametrize(
    ("gold", "prompt", "leaks"),
    [
        ("label", "Judge {text}", False),
        ("label", "Judge {text} {label}", True),
        ("input.label", "Judge {label}", True),
        ("meta.gold", "Judge {meta}", True),
        ("meta.gold", "Judge {meta.gold}", True),
        ("meta.gold", "Judge {meta.text}", False),
        ("a.b", "Judge {a.b}", True),
    ],
)
def test_gold_in_the_prompt(gold: str, prompt: str, leaks: bool) -> None:
    columns = INPUTS["properties"] | {"text": {"type": "string"}}
    assert is_in_prompt(gold, ItemPrompt.parse({"prompt": prompt}), columns) is leaks
