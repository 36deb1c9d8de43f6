"""What every setting means: looked up in the models, for whoever shows a form."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, Final, get_args

from pydantic import BaseModel, Field, TypeAdapter
from pydantic.fields import FieldInfo

from .models import RunConfig

_ENTRY: Final = re.compile(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)
_ASIDE: Final = re.compile(r"^\((key|hosts)\b[^)]*\) ")


def setting(key: str) -> FieldInfo:
    """Return pydantic's account of a setting.

    Args:
        key: Its dotted key, as in a file: ``task.schema``.

    Raises:
        KeyError: There is no such setting.
    """
    return _find(key)[1]


def description(key: str) -> str:
    """Return what a setting means, as the docstring of its section says; no markup.

    Raises:
        KeyError: There is no such setting, or its section says nothing of it.
    """
    section, _, name = _find(key)
    entries = dict(_ENTRY.findall(inspect.getdoc(section) or ""))
    return _ASIDE.sub("", " ".join(entries[name].split()).replace("``", ""))


def schema(key: str) -> dict[str, Any]:
    """Return the JSON Schema of a setting's value: type, choices and bounds, and no default.

    Raises:
        KeyError: There is no such setting.
    """
    found = setting(key)
    kind: Any = Annotated[found.annotation, Field(), *found.metadata]
    made = TypeAdapter(kind).json_schema()
    sections = made.pop("$defs", {})
    if "anyOf" in made:
        made["anyOf"] = [
            sections[option["$ref"].rpartition("/")[2]] if "$ref" in option else option
            for option in made["anyOf"]
        ]
    return made


def section_schema(key: str) -> dict[str, Any]:
    """Return the JSON Schema of a whole section, each setting with what its docstring says.

    Keys that hold secrets are left out: they belong into variables of the environment.

    Raises:
        KeyError: There is no such section.
    """
    section = _section(setting(key).annotation, key)
    properties = {}
    for name, about in section.model_fields.items():
        inner = f"{key}.{about.alias or name}"
        if "Secret" in str(about.annotation):
            continue
        shown = schema(inner) | {"description": description(inner)}
        default = about.get_default(call_default_factory=True)
        if default is None or isinstance(default, bool | int | float | str | list | dict):
            shown["default"] = default
        properties[about.alias or name] = shown
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _find(key: str) -> tuple[type[BaseModel], FieldInfo, str]:
    *parents, last = key.split(".")
    section: type[BaseModel] = RunConfig
    for part in parents:
        section = _section(section.model_fields[part].annotation, key)
    names = {field.alias or name: name for name, field in section.model_fields.items()}
    return section, section.model_fields[names[last]], names[last]


def _section(annotation: Any, key: str) -> type[BaseModel]:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    raise KeyError(key)
