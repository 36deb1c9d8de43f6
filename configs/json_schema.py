"""The JSON Schema of a configuration file, for editors: ``fanfold schema``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from .describe import describe_section
from .models import RunConfig

_VARIABLE: Final = {
    "type": "string",
    "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}",
    "description": "A value from the environment: ${VAR}.",
}
_TEXT: Final = {"type": "string", "minLength": 1}
_NARROWING: Final = frozenset({"pattern", "enum", "const"})
_ANNOTATIONS: Final[tuple[str, ...]] = ("description", "default", "writeOnly")

_FILE_FORMS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "RunConfig": {
        "endpoints": {"const": "auto"},
        "evaluate": {"$ref": "#/$defs/EvaluationConfig"},
        "cache": {"const": False},
    },
    "TaskConfig": {
        "schema": _TEXT,
        "examples": _TEXT,
        "images": {"type": "array", "items": _TEXT, "minItems": 1},
    },
    "EndpointsConfig": {"hosts": _TEXT},
    "FirstConfig": {"paths": _TEXT},
    "AcceleratorsConfig": {
        "ids": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]}
    },
}
"""Values that a file may contain and that are turned into the type of the setting."""

_STAGE_SECTIONS: Final = {
    "map": "TaskConfig",
    "model": "ModelConfig",
    "limits": "LimitsConfig",
    "endpoints": "EndpointsConfig",
}
"""Sections of a stage that are checked when it is joined with the top-level ones."""

_BATCH_INPUT: Final = {
    "required": ["input"],
    "properties": {
        "input": {
            "required": ["format"],
            "properties": {"format": {"const": "openai_batch"}},
        }
    },
}
_REQUIRED: Final = [
    {"if": {"anyOf": [{"required": ["stages"]}, _BATCH_INPUT]}, "else": {"required": ["task"]}},
    {"if": {"required": ["stages"]}, "else": {"required": ["endpoints"]}},
]
"""A pipeline has tasks, and may have endpoints, in its stages; a batch file has tasks in its
lines."""


def write_schema() -> str:
    """Return the JSON Schema of a configuration file as text."""
    return orjson.dumps(make_schema(), option=orjson.OPT_INDENT_2).decode() + "\n"


def make_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file.

    It describes a file before variables are replaced and other files are read.
    """
    made = RunConfig.model_json_schema(schema_generator=_FileSchema)
    definitions: dict[str, Any] = made.pop("$defs")
    del made["required"]
    for name, forms in _FILE_FORMS.items():
        section = made if name == "RunConfig" else definitions[name]
        for key, form in forms.items():
            _add_form(section["properties"], key, form)
    for key, name in _STAGE_SECTIONS.items():
        stage = definitions["StageConfig"]["properties"]
        stage[key]["anyOf"] = [
            {"$ref": f"#/$defs/{name}"} if one.get("type") == "object" else one
            for one in stage[key]["anyOf"]
        ]
    sections = {name: _allow_variables(one) for name, one in definitions.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fanfold configuration",
        **_allow_variables(made),
        "allOf": _REQUIRED,
        "$defs": {"Variable": _VARIABLE, **sections},
    }


class _FileSchema(GenerateJsonSchema):
    """Adds the descriptions of sections and settings; leaves out titles."""

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        made = super().model_schema(schema)
        section: type[BaseModel] = schema["cls"]
        summary, settings = describe_section(section)
        made["description"] = summary.replace("`", "")
        for name, about in section.model_fields.items():
            shown = made["properties"][about.alias or name]
            if name in settings:
                shown["description"] = settings[name].replace("`", "")
            if isinstance(shown.get("default"), dict | list):
                del shown["default"]  # a section shows the defaults of its own settings
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:
        del schema
        return False

    def _update_class_schema(self, json_schema: Any, cls: type[Any], config: Any) -> None:
        super()._update_class_schema(json_schema, cls, config)
        json_schema.pop("title", None)


def _add_form(properties: dict[str, Any], key: str, form: Mapping[str, Any]) -> None:
    old = properties[key]
    noted = {name: old.pop(name) for name in _ANNOTATIONS if name in old}
    options = old["anyOf"] if old.keys() == {"anyOf"} else [old]
    properties[key] = {"anyOf": [*options, dict(form)], **noted}


def _allow_variables(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema in which every value that is narrower than a text may be a variable."""
    made = dict(schema)
    made.pop("discriminator", None)  # of OpenAPI, not of JSON Schema
    for key in ("properties", "patternProperties"):
        if key in made:
            made[key] = {name: _allow_in_property(name, one) for name, one in made[key].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), Mapping):
            made[key] = _allow_variables(made[key])
    if "oneOf" in made:
        made["oneOf"] = [_allow_variables(one) for one in made["oneOf"]]
    if "anyOf" in made:
        narrow = any(_is_narrow(one) for one in made["anyOf"])
        inner = [one if _is_narrow(one) else _allow_variables(one) for one in made["anyOf"]]
        made["anyOf"] = [*inner, {"$ref": "#/$defs/Variable"}] if narrow else inner
    elif _is_narrow(made):
        noted = {name: made.pop(name) for name in _ANNOTATIONS if name in made}
        made = {"anyOf": [made, {"$ref": "#/$defs/Variable"}], **noted}
    return made


def _allow_in_property(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    # an editor finds the settings of an entry of `reduce` by its op, which is a constant
    return dict(schema) if name == "op" else _allow_variables(schema)


def _is_narrow(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    if kind == "string" or "const" in schema or "enum" in schema:
        return bool(_NARROWING & schema.keys())
    return kind in {"integer", "number", "boolean"}
