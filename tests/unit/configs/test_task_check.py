"""Mistakes in a task that a JSON Schema validator accepts."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.loader import load_config
from fanfold.configs.preset_files import preset_names
from fanfold.configs.resolve import resolve_config
from fanfold.configs.yaml_text import parse_yaml


def settings(prompt: str = "Judge {x}", schema: Any = None, system: str = "") -> dict[str, Any]:
    task = {"prompt": prompt, "schema": schema, "system": system}
    return {"name": "t", "task": task, "endpoints": {"urls": ["http://127.0.0.1:1/v1"]}}


def inside(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"label": schema}}


@pytest.mark.parametrize(
    ("schema", "parts"),
    [
        ("{type: string, enum: [yes, no]}", ["label.enum", "true", "string", "'yes'"]),
        ("{type: string, enum: [on, maybe]}", ["label.enum", "true", "booleans"]),
        ("{type: string, enum: [1, 2]}", ["label.enum", "1", "string", "quotes"]),
        ("{type: string, enum: [null, a]}", ["label.enum", "null"]),
        ("{type: integer, enum: ['1', '2']}", ["label.enum", '"1"', "integer"]),
        ("{type: [number, 'null'], enum: [1, x]}", ["label.enum", '"x"', "number or null"]),
        ("{type: string, const: no}", ["label.const", "false"]),
        ("{type: array, items: {type: string, enum: [no]}}", ["label.items.enum", "false"]),
        ("{anyOf: [{type: string, enum: [off]}]}", ["label.anyOf[0].enum", "false"]),
        ("{$defs: {a: {type: string, enum: [off]}}}", ["label.$defs.a.enum", "false"]),
        ("{properties: {score: {}}, required: [scor]}", ["label.required", "'score'"]),
        ("{properties: {score: {}}, required: [why]}", ["label.required", "'why'", "define"]),
        ("{properties: {a: {}}, requird: [a]}", ["label", "'requird'", "'required'"]),
        ("{type: string, maxlength: 3}", ["label", "'maxlength'", "'maxLength'"]),
        ("{type: string, max_length: 3}", ["label", "'max_length'", "'maxLength'"]),
        ("{type: object, aditionalProperties: false}", ["'additionalProperties'"]),
        ("{discription: a colour}", ["'discription'", "'description'"]),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused(schema: str, parts: list[str]) -> None:
    found = parse_yaml(f"schema: {schema}", "test")["schema"]
    with pytest.raises(ConfigurationError) as caught:
        load_config(settings(schema=inside(found)))
    for part in ["settings: task.schema", *parts]:
        assert part in caught.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": ["yes", "no"]},
        {"type": ["boolean", "null"], "enum": [True, None]},
        {"type": "string", "nullable": True, "enum": ["a", None]},
        {"type": "integer", "const": 1.0},
        {"type": "number", "enum": [1, 2.5]},
        {"required": ["a"]},
        {"allOf": [{"properties": {"a": {}}}], "properties": {}, "required": ["a"]},
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}, "required": ["b1"]},
        {"properties": {"requird": {"type": "string"}}, "required": ["requird"]},
        {"default": {"requird": 1}, "examples": [{"requird": 1}], "enum": [{"requird": 1}]},
        {"x-requird": 1, "example": "a", "$comment": "b"},
    ],
)
def test_a_schema_that_is_meant_so_is_accepted(schema: dict[str, Any]) -> None:
    _, notices = resolve_config(settings(schema=inside(schema)))
    assert notices == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"prompt": "Judge it."}, ["task.prompt", "{NAME}"]),
        ({"prompt": "Judge {{x}}"}, ["task.prompt", "{NAME}"]),
        ({"system": "Judge {x}"}, ["task.system", "{x}", "not replaced"]),
        ({"system": "Judge {other}"}, ["task.system", "{other}"]),
        ({"schema": inside({"enum": [True, "maybe"]})}, ["properties.label.enum", "boolean"]),
        ({"schema": inside({"mood": "good"})}, ["properties.label", "'mood'", "no effect"]),
    ],
)
def test_what_is_seldom_meant_is_a_notice(change: dict[str, Any], parts: list[str]) -> None:
    _, (notice,) = resolve_config(settings(**change))
    for part in parts:
        assert part in notice


@pytest.mark.parametrize(
    "prompt",
    ['Answer as {"label": 1}: {x}', "Answer as {'label': {x}}", 'As {\n "label": "a", "b": 1\n}'],
)
def test_json_in_a_prompt_is_told_from_a_column(prompt: str) -> None:
    with pytest.raises(ConfigurationError, match=r"task\.prompt: line 1.*\{\{"):
        load_config(settings(prompt))


@pytest.mark.parametrize("preset", preset_names())
def test_the_presets_have_no_such_notice(preset: str) -> None:
    _, notices = resolve_config(preset)
    assert not [line for line in notices if line.startswith("task.")]


def test_deeply_nested_schemas_are_no_problem() -> None:
    schema: dict[str, Any] = {"type": "string", "enum": [True]}
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ConfigurationError, match=r"items\.enum"):
        load_config(settings(schema=schema))
