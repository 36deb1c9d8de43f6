"""Descriptions of settings for forms, and readable messages for pydantic's errors."""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Final, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ..backends.core.errors import ConfigurationError
from ..backends.core.secrets import is_secret, mask_command
from .aggregators import AGGREGATOR_CONFIGS, CountConfig
from .base import Access
from .models import RunConfig
from .operators import OPERATOR_CONFIGS
from .raw_settings import get_at_path

_ENTRY: Final = re.compile(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)
_NONE: Final = re.compile(r"\bNone\b")
"""In a file None is null."""
_QUALIFIER: Final = re.compile(r"^\((key|hosts)\b[^)]*\) ")


def find_setting(key: str) -> FieldInfo:
    """Return pydantic's description of a setting.

    Args:
        key: Its dotted key, as in a file: ``task.schema``.

    Raises:
        KeyError: There is no such setting.
    """
    return _find(key)[1]


def describe_setting(key: str) -> str:
    """Return the description of a setting from the docstring of its section, without markup.

    Raises:
        KeyError: There is no such setting, or its section does not describe it.
    """
    section, _, name = _find(key)
    return describe_section(section)[1][name].replace("`", "")


def describe_section(section: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Return the summary of a section, and the description of each setting, code in backticks."""
    about = inspect.getdoc(section) or ""
    summary, _, rest = about.partition("Attributes:")
    settings = {name: _QUALIFIER.sub("", _join_lines(text)) for name, text in _ENTRY.findall(rest)}
    return _join_lines(summary), settings


def _join_lines(text: str) -> str:
    return _NONE.sub("null", " ".join(text.split()).replace("``", "`"))


def setting_schema(key: str) -> dict[str, Any]:
    """Return the JSON Schema of a setting's value: type, choices and bounds, without default.

    Raises:
        KeyError: There is no such setting.
    """
    found = find_setting(key)
    kind: Any = Annotated[found.annotation, Field(), *found.metadata]
    made = TypeAdapter(kind).json_schema()
    sections = made.pop("$defs", {})
    if "anyOf" in made:
        made["anyOf"] = [_inline_section(option, sections) for option in made["anyOf"]]
    return made


def _inline_section(option: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema in which the reference to a section, or to a list of one, is replaced."""
    if "$ref" in option:
        found: dict[str, Any] = sections[option["$ref"].rpartition("/")[2]]
        return found
    if "$ref" in option.get("items", {}):
        return option | {"items": _inline_section(option["items"], sections)}
    return option


def section_schema(key: str) -> dict[str, Any]:
    """Return the JSON Schema of a section, each setting with its description.

    Secret keys are left out: secrets belong in environment variables.

    Raises:
        KeyError: There is no such section.
    """
    section = _require_section(find_setting(key).annotation, key)
    properties = {}
    for name, about in section.model_fields.items():
        inner = f"{key}.{about.alias or name}"
        if "Secret" in str(about.annotation):
            continue
        shown = setting_schema(inner) | {"description": describe_setting(inner)}
        default = about.get_default(call_default_factory=True)
        if default is None or isinstance(default, bool | int | float | str | list | dict):
            shown["default"] = default
        properties[about.alias or name] = shown
    return {"type": "object", "properties": properties, "additionalProperties": False}


def iter_access(
    model: type[BaseModel] = RunConfig, before: str = ""
) -> Iterator[tuple[str, Access | None]]:
    """Yield the dotted key of each setting, and what a request may do with it.

    The access is None for a setting without a declaration.

    Args:
        model: The section.
        before: Prefix of its keys.
    """
    declared: Mapping[str, Access] = getattr(model, "access", {})
    for name, about in model.model_fields.items():
        key = about.alias or name
        section = find_section(about.annotation)
        if section is None:
            yield f"{before}{key}", declared.get(key)
        else:
            yield from iter_access(section, f"{before}{key}.")


def split_settings(key: str, value: Any) -> Iterator[tuple[str, Any, Access]]:
    """Yield the settings that an assignment to a key sets, and their access.

    An assignment to a section sets each key in it. An entry of a mapping or list,
    ``model.extra_body.top_k``, has the access of the whole.

    Args:
        key: The dotted key of a setting, a section or an entry within a setting.
        value: The assigned value.

    Raises:
        ConfigurationError: There is no such setting, or a section is set to a plain value.
    """
    section: type[BaseModel] = RunConfig
    for part in key.split("."):
        fields = {about.alias or name: about for name, about in section.model_fields.items()}
        if part not in fields:
            close = get_close_matches(part, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(f"{key}: there is no setting {part!r} here{hint}")
        inner = find_section(fields[part].annotation)
        if inner is None:
            access: dict[str, Access] = getattr(section, "access", {})
            yield key, value, access.get(part, Access.CLOSED)
            return
        section = inner
    if value is None:
        yield key, value, Access.CLOSED
    elif isinstance(value, Mapping):
        for name, inside in value.items():
            yield from split_settings(f"{key}.{name}", inside)
    else:
        msg = f"{key}: is a section; give a mapping of its keys (found {type(value).__name__})"
        raise ConfigurationError(msg)


def find_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a setting is, or None if it has a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _find(key: str) -> tuple[type[BaseModel], FieldInfo, str]:
    *parents, last = key.split(".")
    section: type[BaseModel] = RunConfig
    for part in parents:
        section = _require_section(section.model_fields[part].annotation, key)
    names = {field.alias or name: name for name, field in section.model_fields.items()}
    return section, section.model_fields[names[last]], names[last]


def _require_section(annotation: Any, key: str) -> type[BaseModel]:
    if (found := find_section(annotation)) is None:
        raise KeyError(key)
    return found


_UNION_TAGS: Final = frozenset({"operator", "aggregators", *AGGREGATOR_CONFIGS, *OPERATOR_CONFIGS})
_MAPPING: Final = "expected keys with values below it"
_WORDS: Final = {
    "reduce.bins": "expected a whole number of bins, or a list of their edges",
    "name": "expected letters, digits and _ . - (64 at most, a letter or digit first)",
    "task.graph": "expected package.module:attribute",
    "reduce.function": "expected package.module:function",
    "string_type": "expected a text; put a number in quotes",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "string_too_short": "must not be empty",
}
"""Messages that replace pydantic's, by key or by kind of finding."""


def explain_validation(error: ValidationError, raw: dict[str, Any], source: str) -> str:
    """Return one line per finding: ``file: key: what is wrong``.

    Values are shown as the user wrote them (``${VAR}`` unexpanded); sections and secrets are not.
    """
    lines = (_line(finding, raw) for finding in error.errors(include_url=False))
    return "\n".join(dict.fromkeys(f"{source}: {line}" for line in lines))


def _line(finding: Any, raw: dict[str, Any]) -> str:
    loc, kind = list(finding["loc"]), finding["type"]
    if loc[:1] == ["reduce"] and len(loc) > 2 and loc[2] in AGGREGATOR_CONFIGS:  # noqa: PLR2004 - reduce, n, op
        del loc[2]  # pydantic also names the member of the union
        if loc[2:3] == ["bins"]:
            del loc[3:]  # … and the alternatives of a value
    if loc[:1] == ["stages"]:  # pydantic also names the members of the unions
        loc = [name for name in loc[:3] if name != "reduce"] + (
            ["reduce", *(one for one in loc[3:] if one not in _UNION_TAGS)]
            if loc[2:3] == ["reduce"]
            else loc[3:]
        )
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{_known(loc, raw)}"
    if kind == "missing" and loc[-1:] != ["op"]:
        return f"the key {key!r} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found") or (
        kind in ("literal_error", "missing") and loc[-1:] == ["op"]
    ):
        place = loc[:-1] if loc[-1:] == ["op"] else loc
        known = OPERATOR_CONFIGS if isinstance(loc[-1], str) else AGGREGATOR_CONFIGS
        explained = _unknown_op(get_at_path(raw, [*place, "op"]), known)
        return f"{'.'.join(map(str, place))}: {explained}"
    message = (
        _WORDS.get(_unnumbered(loc))
        or _WORDS.get(kind)
        or finding["msg"].removeprefix("Value error, ")
    )
    where = f"{key}: " if key else ""  # a message about several keys names them itself
    return f"{where}{message[:1].lower()}{message[1:]}{_shown(loc, raw)}"


def _unnumbered(loc: Sequence[str | int]) -> str:
    return ".".join(name for name in loc if isinstance(name, str))


def _unknown_op(op: object, ops: Collection[str]) -> str:
    known = ", ".join(ops)
    if op is None:
        return f"the key 'op' is missing; there are {known}"
    close = get_close_matches(str(op), ops, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown op {op!r}; there are {known}{hint}"


def _shown(loc: Sequence[str | int], raw: dict[str, Any]) -> str:
    value = get_at_path(raw, loc)
    if value is None or isinstance(value, dict | list) or _may_be_secret(loc, value):
        return ""
    text = repr(mask_command(value) if isinstance(value, str) else value)
    return f" (found {text if len(text) <= 80 else text[:77] + '…'})"  # noqa: PLR2004 - one line


def _may_be_secret(loc: Sequence[str | int], value: object) -> bool:
    hidden = list(loc[:2]) in (["node", "serve"], ["node", "env"])
    return hidden or is_secret(str(loc[-1])) or (isinstance(value, str) and "@" in value)


def _known(loc: Sequence[str | int], raw: dict[str, Any]) -> str:
    names = _fields(loc[:-1], raw)
    close = get_close_matches(str(loc[-1]), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known here: {', '.join(names)})"


def _fields(loc: Sequence[str | int], raw: dict[str, Any]) -> list[str]:
    """Return the known keys of a section."""
    model: type[BaseModel] = RunConfig
    for name in loc:
        if loc[0] == "reduce":
            model = AGGREGATOR_CONFIGS.get(str(get_at_path(raw, [*loc[:2], "op"])), CountConfig)
            break
        if isinstance(name, str):  # a number is the place in a list
            model = _model_of(model, name)
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(model: type[BaseModel], name: str) -> type[BaseModel]:
    if name not in model.model_fields:  # the number of an entry
        return model
    candidates: list[Any] = [model.model_fields[name].annotation]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        candidates += get_args(candidate)
    return model
