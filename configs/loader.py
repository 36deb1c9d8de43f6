"""Load a file, preset or mapping into a checked RunConfig."""

from __future__ import annotations

import copy
import csv
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import orjson
from pydantic import ValidationError

from ..backends.core.errors import ConfigurationError
from ..backends.core.templates import EXAMPLE_OUTPUT
from .aggregators import check_aggregators
from .backend import find_unfit_keys
from .base import expand_home
from .describe import explain_validation
from .evaluation import resolve_evaluations
from .models import RunConfig
from .operators import CascadeConfig
from .raw_settings import (
    RawSettings,
    apply_override,
    check_overrides,
    escape_variables,
    expand_auto,
    expand_variables,
    read_settings,
    set_path,
)
from .serialize import check_plain, to_plain
from .stages import expand_merge, make_stage_settings
from .task_check import check_cascade, check_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked configuration.

    Attributes:
        config: The settings, variables expanded.
        plain: The same as plain data for ``run.yaml``: ``${VAR}`` unexpanded, paths absolute,
            the schema inlined, no secrets.
        source: Its name in messages: a path or ``preset NAME``.
        preset: The preset's name if it is one.
        raw: The checked data, unexpanded, to be loaded again with changes; it may contain a
            secret in plain text, so it never leaves the process.
    """

    config: RunConfig = field(repr=False)
    plain: dict[str, Any]
    source: str
    preset: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


def load_config(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Load and check a configuration.

    Args:
        config: A preset's name, a YAML file, or the settings themselves.
        overrides: ``a.b=value`` assignments, applied in order.
        settings: Dotted keys to plain values, applied after the overrides; relative paths in
            them start at the working directory.
        environment: Variables for ``${VAR}``; by default those of the process.

    Raises:
        ConfigurationError: A setting is missing, unknown, of the wrong type or contradictory.
    """
    return check_settings(
        override_settings(read_settings(config), overrides), settings, environment
    )


def override_settings(raw: RawSettings, overrides: Sequence[str]) -> RawSettings:
    """Apply ``a.b=value`` assignments to settings in place, in order; return the settings.

    Raises:
        ConfigurationError: An assignment cannot be applied.
    """
    for note in _apply_overrides(raw.data, check_overrides(overrides)):
        logger.warning("%s", note)
    return raw


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply overrides in place; return notes on keys that were dropped for them."""
    before = copy.deepcopy(data.get("backend"))
    for assignment in overrides:
        apply_override(data, assignment)
        expand_auto(data)
    named = {assignment.partition("=")[0].strip() for assignment in overrides}
    if "backend.kind" in named and "backend" not in named and isinstance(before, dict):
        return _drop_unfit_keys(data["backend"], before, named)
    return []


def _drop_unfit_keys(
    section: dict[str, Any], before: Mapping[str, Any], named: Set[str]
) -> list[str]:
    """Drop keys of a section that only apply to its old kind, unless they are given again."""
    old, new = before.get("kind", "local"), str(section["kind"])
    unfit = find_unfit_keys(before, new) if new != old else {}
    dropped = {k: changed for k, changed in unfit.items() if not _is_named(f"backend.{k}", named)}
    for key in dropped:
        del section[key]
    listed = ", ".join(f"backend.{key}" for key, changed in dropped.items() if changed)
    return [f"backend.kind is {new} in place of {old}: {listed} left out"] if listed else []


def _is_named(path: str, named: Set[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for name in named)


def check_settings(
    raw: RawSettings,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Check settings that were read; changes ``raw.data`` in place.

    Args:
        raw: The settings.
        settings: Changes to them, as for :func:`load_config`.
        environment: Variables for ``${VAR}``; by default those of the process.

    Raises:
        ConfigurationError: A setting is missing, unknown, of the wrong type or contradictory.
    """
    data, source = raw.data, raw.source
    for path, value in (settings or {}).items():
        set_path(data, path, value)
    check_plain(data, source)
    if isinstance(data.get("evaluate"), dict):
        data["evaluate"] = [data["evaluate"]]
    expand_merge(data)
    _resolve_files(data, source, raw.folder)
    environment = os.environ if environment is None else environment
    checked = _validate(data, expand_variables(data, environment, source), source)
    _check(checked, source)
    loaded = LoadedConfig(checked, to_plain(checked, data), source, raw.preset, data)
    for number, stage in enumerate(checked.stages or ()):
        staged = load_stage(loaded, number, environment=environment)
        if stage.cascade is not None:
            _check_cascade(staged, stage.cascade)
        _check_simulated(loaded, staged, number)
    return loaded


def _check_simulated(loaded: LoadedConfig, staged: LoadedConfig, number: int) -> None:
    """Check that simulated and other answers are not mixed in one pipeline.

    Raises:
        ConfigurationError: Only some of the endpoints are simulated.
    """
    assert loaded.config.stages is not None, "the settings have stages"
    common = loaded.config.endpoints.simulated is not None
    kinds = {f"stages.{number}.endpoints": staged.config.endpoints.simulated is not None}
    cascade = loaded.config.stages[number].cascade
    if cascade is not None and (small := cascade.small.endpoints) is not None:
        is_simulated = isinstance(small, dict) and small.get("simulated") is not None
        kinds[f"stages.{number}.cascade.small.endpoints"] = is_simulated
    for key, is_simulated in kinds.items():
        if is_simulated != common:
            names = {True: "a simulated fleet", False: "real endpoints"}
            msg = (
                f"{staged.source}: {key} are {names[is_simulated]}, and the top-level endpoints "
                f"{names[common]}; simulated and real answers are not mixed: change one of them"
            )
            raise ConfigurationError(msg)


def _check_cascade(staged: LoadedConfig, cascade: CascadeConfig) -> None:
    try:
        check_cascade(cascade, staged.config.task)
    except ConfigurationError as error:
        raise ConfigurationError(f"{staged.source}: {error.message}") from None


def load_stage(
    loaded: LoadedConfig,
    number: int,
    changes: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Return the settings of a stage as those of a run.

    Args:
        loaded: The settings of the pipeline.
        number: The stage, from 0.
        changes: Sections that replace those of the stage.
        environment: Variables for ``${VAR}``; by default those of the process.

    Raises:
        ConfigurationError: A setting of the stage is wrong.
    """
    assert loaded.config.stages is not None, "the settings have stages"
    data = make_stage_settings(loaded.raw, number) | dict(changes or {})
    source = f"{loaded.source}: stage {loaded.config.stages[number].name!r}"
    expand_auto(data)
    return check_settings(RawSettings(data, source, Path.cwd()), environment=environment)


def _resolve_files(data: dict[str, Any], source: str, base: Path) -> None:
    """Make paths absolute and inline the schema file, so that the settings are self-contained."""
    for entry in _list_python_reducers(data):
        entry.setdefault("folder", ".")
    _change_paths(data, lambda path: _absolute(path, base))
    tasks = [data.get("task"), *(stage.get("map") for stage in _list_stages(data))]
    for task in tasks:
        if isinstance(task, dict) and isinstance(task.get("schema"), str):
            task["schema"] = read_schema(Path(_absolute(task["schema"], base)), source)
        if isinstance(task, dict) and isinstance(task.get("examples"), str):
            examples = read_examples(Path(_absolute(task["examples"], base)), source)
            task["examples"] = escape_variables(examples)


def _list_stages(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of settings that are not checked yet."""
    stages = data.get("stages")
    return [one for one in stages if isinstance(one, dict)] if isinstance(stages, list) else []


def _change_paths(data: dict[str, Any], change: Callable[[str], str]) -> None:
    """Change, in place, all settings that are paths of files or folders."""
    for stage in _list_stages(data):
        _change_paths(stage, change)
        cascade = stage.get("cascade")
        if isinstance(cascade, dict) and isinstance(cascade.get("small"), dict):
            _change_paths(cascade["small"], change)
    for section, key in (
        ("input", "path"),
        ("batch", "output"),
        ("batch", "errors"),
        ("endpoints", "file"),
        ("backend", "registry"),
    ):
        part = data.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = change(part[key])
    for entry in _list_python_reducers(data):
        if isinstance(entry.get("folder"), str):
            entry["folder"] = change(entry["folder"])
    task = data.get("task")
    images = task.get("images") if isinstance(task, dict) else None
    if isinstance(images, dict) and isinstance(images.get("folder"), str):
        images["folder"] = change(images["folder"])
    if isinstance(cache := data.get("cache"), str) and cache not in ("off", "run"):
        data["cache"] = change(cache)
    endpoints = data.get("endpoints")
    if isinstance(endpoints, dict) and (hosts := endpoints.get("hosts")):
        listed = hosts if isinstance(hosts, list) else [hosts]
        endpoints["hosts"] = [change(h) if isinstance(h, str) and "/" in h else h for h in listed]


def _list_python_reducers(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = data.get("reduce")
    entries = listed if isinstance(listed, list) else []
    return [one for one in entries if isinstance(one, dict) and one.get("op") == "python"]


def make_portable(plain: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings for a file in a folder, with paths below the folder relative to it.

    Reading the file makes them absolute again, wherever the folder is then.

    Args:
        plain: The settings as plain data, paths absolute.
        folder: The folder.
    """
    resolved = folder.resolve()

    def relative(path: str) -> str:
        if not path.startswith("/"):  # a variable
            return path
        for spelled in (Path(os.path.normpath(path)), Path(path).resolve()):
            for parent in (folder.absolute(), resolved):
                if spelled.is_relative_to(parent):
                    return f"./{spelled.relative_to(parent)}"
        return path

    settings: dict[str, Any] = orjson.loads(orjson.dumps(plain))  # a fast deep copy
    _change_paths(settings, relative)
    return settings


def _absolute(path: str, base: Path) -> str:
    """Return an absolute path; a path that begins with a variable is unchanged."""
    if not path or path.startswith("$"):
        return path
    return str(base / expand_home(path))


def read_schema(path: Path, source: str) -> dict[str, Any]:
    """Read a file with a JSON Schema, without expanding variables.

    Raises:
        ConfigurationError: It cannot be read, or has no schema; names ``source`` and the file.
    """
    try:
        schema = orjson.loads(path.read_bytes())
    except OSError as error:
        msg = f"{source}: task.schema: {path} cannot be read: {error.strerror}"
        raise ConfigurationError(msg) from None
    except orjson.JSONDecodeError as error:
        msg = f"{source}: task.schema: {path}, line {error.lineno}: not valid JSON: {error.msg}"
        raise ConfigurationError(msg) from None
    if not isinstance(schema, dict):
        msg = f"{source}: task.schema: {path} contains no JSON Schema object"
        raise ConfigurationError(msg)
    return schema


def read_examples(path: Path, source: str) -> list[dict[str, Any]]:
    """Read a jsonl or csv file with examples of a task.

    Raises:
        ConfigurationError: It cannot be read; names ``source``, the file and the line.
    """
    where = f"{source}: task.examples: {path}"
    readers = {".jsonl": _iter_objects, ".csv": _iter_cells}
    if (read := readers.get(path.suffix.lower())) is None:
        raise ConfigurationError(f"{where}: name a .jsonl or .csv file, or write a list")
    try:
        if path.stat().st_size > _MOST_EXAMPLE_BYTES:
            msg = (
                f"{where}: has more than {_MOST_EXAMPLE_BYTES:,} bytes; every item sends all of it"
            )
            raise ConfigurationError(msg)
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(read(file, where))
    except OSError as error:
        raise ConfigurationError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{where}: not UTF-8 text; save it as UTF-8") from error


_MOST_EXAMPLE_BYTES: Final = 10_000_000


def _iter_objects(file: TextIO, where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            found = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            msg = f"{where}, line {number}: not valid JSON: {error.msg}"
            raise ConfigurationError(msg) from None
        if not isinstance(found, dict):
            raise ConfigurationError(f"{where}, line {number}: not a JSON object")
        yield found


def _iter_cells(file: TextIO, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a csv file; an ``output`` that is JSON is read as JSON."""
    rows = csv.DictReader(file, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                msg = f"{where}, line {rows.line_num}: has more or fewer cells than the header"
                raise ConfigurationError(msg)
            with suppress(KeyError, orjson.JSONDecodeError):
                row[EXAMPLE_OUTPUT] = orjson.loads(row[EXAMPLE_OUTPUT])
            yield dict(row)
    except csv.Error as error:
        raise ConfigurationError(f"{where}, after line {rows.line_num}: {error}") from None


def _validate(raw: dict[str, Any], expanded: dict[str, Any], source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(expanded)
    except ValidationError as error:
        raise ConfigurationError(explain_validation(error, raw, source)) from None


def _check(config: RunConfig, source: str) -> None:
    try:
        check_task(config.task)
        check_aggregators(config.reduce, config.result_schema, has_samples=config.task.samples > 1)
        resolve_evaluations(config.evaluate, config.result_schema)
    except ConfigurationError as error:
        msg = f"{source}: {error.message}"
        raise ConfigurationError(msg) from None
