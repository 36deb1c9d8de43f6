"""From a file, a preset or a mapping to a checked configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import orjson
import yaml
from pydantic import SecretStr, ValidationError

from ..backends.contract.errors import ConfigurationError
from ..backends.contract.template import Template
from .explain import explain
from .models import RunConfig
from .presets import is_preset, preset_text
from .reduce import check_stages
from .source import apply_override, expand, parse_yaml, set_path

MASKED: Final = "**********"
"""What stands in ``run.yaml`` for a key that was written out in the configuration."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checked configuration.

    Attributes:
        config: The settings, variables expanded.
        plain: The same as plain data for ``run.yaml``: ``${VAR}`` unexpanded, paths absolute,
            the schema inlined, no secrets.
        source: How messages name it: a path or ``preset NAME``.
        preset: The preset's name when it is one.
        raw: The data that was checked, unexpanded, to be loaded again with changes; it may hold
            a secret that was written out, so it never leaves the process.
    """

    config: RunConfig
    plain: dict[str, Any]
    source: str
    preset: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


def load(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Load and check a configuration.

    Args:
        config: A preset's name, a YAML file, or the settings themselves.
        overrides: ``a.b=value`` assignments, applied in order.
        settings: Dotted keys to plain values, applied after the overrides; relative paths in
            them are taken from the working directory.
        environment: Where ``${VAR}`` is looked up; the process's own by default.

    Raises:
        ConfigurationError: Something is missing, unknown, of the wrong type or contradictory.
    """
    data, source, base, preset = _read(config)
    for assignment in overrides:
        apply_override(data, assignment)
    for path, value in (settings or {}).items():
        set_path(data, path, value)
    _inline(data, source, base)
    environment = os.environ if environment is None else environment
    checked = _validate(data, expand(data, environment, source), source)
    _check(checked, source)
    return Loaded(checked, _plain(checked, data), source, preset, data)


def _read(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, Path, str | None]:
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config)), "settings", Path.cwd(), None
    if isinstance(config, str) and is_preset(config):
        source = f"preset {config}"
        return parse_yaml(preset_text(config), source), source, Path.cwd(), config
    path = Path(config)
    return parse_yaml(read_text(path), str(config)), str(config), path.resolve().parent, None


def read_text(path: Path) -> str:
    """Read a settings file.

    Raises:
        ConfigurationError: Missing, unreadable or not UTF-8; names the file and the way out.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        msg = f"{path}: no such file, and no preset of that name; see 'fanfold presets list'"
        raise ConfigurationError(msg) from None
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ConfigurationError(msg) from None
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ConfigurationError(msg) from None


def _inline(data: dict[str, Any], source: str, base: Path) -> None:
    """Make paths absolute and read the schema's file, so that the settings stand alone."""
    for section, key in (("input", "path"), ("endpoints", "file")):
        part = data.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = _absolute(part[key], base)
    task = data.get("task")
    if isinstance(task, dict) and isinstance(task.get("schema"), str):
        task["schema"] = _read_schema(Path(_absolute(task["schema"], base)), source)


def _absolute(path: str, base: Path) -> str:
    """Return an absolute path; one that begins with a variable is left for the variable."""
    return path if path.startswith("$") else str(base / Path(path).expanduser())


def _read_schema(path: Path, source: str) -> dict[str, Any]:
    try:
        schema = orjson.loads(path.read_bytes())
    except OSError as error:
        msg = f"{source}: task.schema: {path} cannot be read: {error.strerror}"
        raise ConfigurationError(msg) from None
    except orjson.JSONDecodeError as error:
        msg = f"{source}: task.schema: {path}, line {error.lineno}: not valid JSON: {error.msg}"
        raise ConfigurationError(msg) from None
    if not isinstance(schema, dict):
        msg = f"{source}: task.schema: {path} holds no JSON Schema object"
        raise ConfigurationError(msg)
    return schema


def _validate(raw: dict[str, Any], expanded: dict[str, Any], source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(expanded)
    except ValidationError as error:
        raise ConfigurationError(explain(error, raw, source)) from None


def _check(config: RunConfig, source: str) -> None:
    schema = config.task.answer_schema
    try:
        Template.parse(config.task.prompt)
        if schema is not None:
            _check_schema(schema)
        check_stages(config.reduce, schema)
    except ConfigurationError as error:
        msg = f"{source}: {error.message}"
        raise ConfigurationError(msg) from None


def _check_schema(schema: dict[str, Any]) -> None:
    try:
        jsonschema_rs.meta.validate(schema)
        jsonschema_rs.validator_for(schema)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        where = ".".join(map(str, getattr(error, "instance_path", ()))) or "its top"
        reason = getattr(error, "message", str(error))
        msg = f"task.schema is no valid JSON Schema: at {where}: {reason}"
        raise ConfigurationError(msg) from None


def _plain(config: RunConfig, raw: dict[str, Any]) -> dict[str, Any]:
    """Return all settings, defaults included, with the strings as the user wrote them."""
    settings = config.model_dump(mode="json", by_alias=True, exclude_none=False)
    plain: dict[str, Any] = _unexpand(settings, raw)
    key = raw.get("endpoints", {}).get("api_key")
    plain["endpoints"]["api_key"] = _safe_key(key, config.endpoints.api_key)
    return plain


def _unexpand(plain: Any, raw: Any) -> Any:
    if isinstance(plain, dict) and isinstance(raw, dict):
        return {k: _unexpand(v, raw.get(k)) for k, v in plain.items()}
    if isinstance(plain, list) and isinstance(raw, list) and len(plain) == len(raw):
        return [_unexpand(p, r) for p, r in zip(plain, raw, strict=True)]
    return raw if isinstance(raw, str) and "${" in raw else plain


def _safe_key(raw: Any, key: SecretStr) -> str:
    if key.get_secret_value() == "EMPTY":
        return "EMPTY"
    return raw if isinstance(raw, str) and raw.startswith("${") and raw.endswith("}") else MASKED


def to_yaml(plain: Mapping[str, Any]) -> str:
    """Render plain settings as YAML, long texts as blocks."""
    return yaml.dump(dict(plain), Dumper=_BlockDumper, sort_keys=False, allow_unicode=True)


class _BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as literal blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_BlockDumper.add_representer(str, _text)
