"""Check requests: the settings and input of an invocation.

Settings bound to a graph in Python, on the command line or in a file at the start are trusted.
The context and input of an invocation are a request, by any sender. Each setting declares its
:class:`~fanfold.configs.base.Access`; a request never reads an environment variable.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Self

import orjson
from pydantic import ValidationError

from ..backends.budget.limits import SETTING_UNITS
from ..backends.core.errors import ConfigurationError, InputError
from ..backends.core.request_urls import REQUEST_KINDS
from ..backends.core.secrets import is_secret, mask_command, mask_data
from ..backends.core.types import Json
from ..backends.inputs.formats import find_matches, is_pattern, open_source
from ..configs.aggregators import FinalReducerConfig
from ..configs.base import Access, expand_home
from ..configs.budget import BudgetConfig
from ..configs.describe import iter_access, split_settings
from ..configs.loader import LoadedConfig, load_config, read_examples, read_schema
from ..configs.models import SAMPLING_FIELDS, InputConfig, RunConfig
from ..configs.preset_files import is_preset
from ..configs.raw_settings import (
    REFERENCE_START,
    escape_variables,
    get_at_path,
    read_settings_file,
)
from ..configs.resolve import endpoint_settings, resolve_config
from ..configs.serialize import check_plain, find_lost_secrets
from ..configs.yaml_text import parse_requested_value, parse_yaml
from ..nodes.batch.load import describe_unknown_keys
from .context_schema import VARIABLE_PATTERN, SettingsForm

ALLOW_ENV: Final = "FANFOLD_SERVER_ALLOW"
"""Variable with the comma-separated keys that the owner opens to requests."""

ROOT_ENV: Final = "FANFOLD_SERVER_ROOT"
"""Variable with the folder in which a request may name files."""

_SECRETS: Final = frozenset({"endpoints.api_key", "endpoints.first.token"})
"""Settings that must be opened by name, not by section; they hold references to variables."""

_BOUND: Final = frozenset({"endpoints.first.token", "endpoints.first.token_command"})
"""Settings that give the owner's token for a gateway."""

_SAMPLED: Final = "model.extra_body"

_NO_ADDRESS: Final = re.compile(
    r"endpoints\.(api_key|models(\..*)?|refresh_s|least|wait_s"
    r"|first\.(token|token_command|requests_per_s|tokens_per_min|window_s))"
)
"""Settings of the endpoints that do not change where requests go."""

_QUESTION_FIELDS: Final = SAMPLING_FIELDS | {
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "response_format",
    "seed",
    "stream",
    "stream_options",
    "temperature",
}
"""Fields of an item that is itself a request, which correspond to settings that are open, besides
those that the model reads."""

_INLINED: Final = frozenset({"task.schema", "task.examples"})
"""Settings that are data, or a file whose content takes its place."""

_COMMANDS: Final = frozenset({"endpoints.first.token_command", "node.serve", "backend.command"})

_MOST_BYTES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class CallerSettings:
    """The settings that one invocation, or all invocations of a run so far, request.

    Attributes:
        preset: The preset that replaces the bound task; None keeps the bound task or uses
            ``config``.
        config: True if the settings replace the bound task, as a configuration does.
        settings: Dotted keys and their values.
    """

    preset: str | None = None
    config: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Return True if it requests nothing."""
        return self == CallerSettings()

    def merge(self, other: CallerSettings) -> CallerSettings:
        """Merge two requests; a preset or a configuration in ``other`` replaces this one."""
        if other.preset is not None or other.config:
            return other
        return replace(self, settings={**self.settings, **other.settings})

    def to_json(self) -> dict[str, Json]:
        """Return the request for the run's provenance, without secrets, as in ``run.yaml``.

        The input is recorded separately.
        """
        kept = {k: _mask(k, v) for k, v in self.settings.items() if not k.startswith("input.")}
        return {"v": 1, "preset": self.preset, "config": self.config, "settings": kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Self:
        """Return a request from the run's provenance; None gives an empty one."""
        if data is None:
            return cls()
        return cls(data["preset"], data["config"], dict(data["settings"]))


@dataclass(frozen=True)
class CallerPolicy:
    """The settings that the owner of a graph opens to requests.

    Attributes:
        allowed: Keys that a request may set to any value: dotted keys, sections, or fields of the
            context that are not settings.
        root: The folder in which a request may name files; None refuses paths.
    """

    allowed: frozenset[str] = frozenset()
    root: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Return the policy from environment variables, read once at the start.

        Raises:
            ConfigurationError: A key is unknown, or the root is not a folder.
        """
        found = os.environ if environment is None else environment
        keys = frozenset(filter(None, (key.strip() for key in found.get(ALLOW_ENV, "").split(","))))
        known = _list_openable_keys()
        if unknown := sorted(key for key in keys - known if not _is_entry(key)):
            msg = (
                f"{ALLOW_ENV}: {describe_unknown_keys(unknown, sorted(known))}; see "
                "docs/langgraph.md"
            )
            raise ConfigurationError(msg)
        root = None
        if text := found.get(ROOT_ENV):
            root = expand_home(text).resolve()
            if not root.is_dir():
                raise ConfigurationError(f"{ROOT_ENV}: {text} is not a folder")
        return cls(keys, root)

    def is_open(self, key: str) -> bool:
        """Return True if the owner opened a key or its section; secrets only by name."""
        if key in _SECRETS:
            return key in self.allowed
        return any(key == one or key.startswith(f"{one}.") for one in self.allowed)

    def is_shown(self, name: str) -> bool:
        """Return True if a form shows a field: a request may set it, or a part of it."""
        found = FORM_FIELDS[name]
        if "section" in found:
            section = found["section"]
            return self.is_open(section) or any(k.startswith(f"{section}.") for k in self.allowed)
        return self.is_open(_setting_key(name)) or _field_access(name) is not Access.CLOSED

    # -- from an invocation's context to a request -----------------------------------------

    def read_request(self, given: Mapping[str, Any]) -> CallerSettings:
        """Return the request in a context.

        Args:
            given: Fields of the context that differ from their defaults.

        Raises:
            ConfigurationError: A field is closed to requests, or malformed.
        """
        base = CallerSettings()
        if (config := given.get("config")) is not None:
            base = self._read_config(config)
        elif "preset" in given:
            base = CallerSettings(preset=self._preset(given["preset"]))
        settings = dict(self._iter_settings(self._iter_assignments(given), "context"))
        return base.merge(CallerSettings(settings=settings))

    def check_fields(self, given: Mapping[str, Any]) -> None:
        """Check which fields a context has; ``read_request`` checks their content.

        Raises:
            ConfigurationError: A field is closed to requests, or is not plain data.
        """
        check_plain(given, "context")
        if len(orjson.dumps(dict(given))) > _MOST_BYTES:
            msg = f"context: more than {_MOST_BYTES:,} bytes of settings; give items as the input"
            raise ConfigurationError(msg)
        closed = [
            _setting_key(name)
            for name in given
            if _field_access(name) is Access.CLOSED
            and "section" not in FORM_FIELDS[name]
            and not self.is_open(_setting_key(name))
        ]
        if closed:
            raise self._refusal("context", closed)

    def _refusal(self, where: str, keys: Sequence[str]) -> ConfigurationError:
        listed = ", ".join(keys)
        msg = (
            f"{where}: a request may not set {listed}; the owner of the graph can bind it, or open "
            f"it with {ALLOW_ENV}={','.join(keys)} in the server's environment, or trust all that "
            "arrives with an invocation: build_graph(…, trust_context=True)"
        )
        return ConfigurationError(msg)

    def _iter_assignments(self, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield dotted keys and values from the fields and overrides of a context."""
        for name, value in given.items():
            about = FORM_FIELDS[name]
            if "key" in about:
                yield about["key"], value
            elif "section" in about:
                if not isinstance(value, Mapping):
                    raise ConfigurationError(f"context: {name}: give a mapping of settings")
                yield from ((f"{about['section']}.{key}", part) for key, part in value.items())
        if "endpoints" in given:
            yield from endpoint_settings(str(given["endpoints"]), None).items()
        if "api_key" in given:
            yield "endpoints.api_key", given["api_key"]
        overrides = given.get("overrides", [])
        if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
            raise ConfigurationError("context: overrides: give a list of texts, KEY=VALUE each")
        for one in overrides:
            key, equals, text = one.partition("=")
            if not equals:
                raise ConfigurationError("context: overrides: expected KEY=VALUE")
            yield key.strip(), parse_requested_value(text, f"context: overrides: {key.strip()}")

    def _iter_settings(
        self, assigned: Iterator[tuple[str, Any]], where: str, base: Path | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield the single settings of assignments, after checking access.

        Raises:
            ConfigurationError: A request may not set one of them.
        """
        closed = dict[str, None]()
        for assigned_key, assigned_value in assigned:
            for key, value, access in split_settings(assigned_key, assigned_value):
                if key in _INLINED and isinstance(value, str):
                    yield key, self._resolve_path(key, value, base)
                elif self.is_open(key):
                    yield key, value
                elif access is Access.PATH and value is not None:
                    yield key, self._resolve_path(key, value, base)
                elif access is Access.SAMPLING:
                    inside = dict(_iter_sampling(key, value))
                    names = (n for n in inside if n not in SAMPLING_FIELDS)
                    fields_ = (f"{_SAMPLED}.{name}" for name in names)
                    closed |= dict.fromkeys(key for key in fields_ if not self.is_open(key))
                    yield from ((f"{_SAMPLED}.{name}", part) for name, part in inside.items())
                elif access is Access.CLOSED:
                    closed[key] = None
                else:
                    yield key, value
        if closed:
            raise self._refusal(where, list(closed))

    def _preset(self, name: object) -> str:
        if not isinstance(name, str) or not is_preset(name):
            resolve_config(str(name))  # raises, listing the presets
            raise ConfigurationError(f"context: preset: {name!r} is not a preset")
        return name

    def _read_config(self, config: object) -> CallerSettings:
        """Return the request for a configuration: a mapping, a preset, or a file."""
        if isinstance(config, Mapping):
            data, where, base = config, "context: config", None
        elif isinstance(config, str) and is_preset(config):
            return CallerSettings(preset=config)
        elif isinstance(config, str):
            path = self._resolve_path("config", config)
            data = parse_yaml(read_settings_file(Path(path)), config, aliases=False)
            check_plain(data, config)
            where, base = config, Path(path).parent
        else:
            raise ConfigurationError("context: config: give a mapping of settings, or a file")
        return CallerSettings(
            config=True, settings=dict(self._iter_settings(iter(data.items()), where, base))
        )

    # -- files ------------------------------------------------------------------------------

    def resolve_path(self, text: str | os.PathLike[str]) -> str:
        """Return the file or folder that an input names; blocks.

        Raises:
            InputError: It is not in the root folder.
        """
        try:
            return self._resolve_path("input.path", os.fspath(text))
        except ConfigurationError as error:
            raise InputError(error.message) from None

    def check_items(self, config: InputConfig, items: Sequence[Mapping[str, Any]] | None) -> None:
        """Check the input that a request gives, if its items are themselves requests; blocks.

        Their fields are sent as they are, so they may set no more than the request's settings.

        Args:
            config: The settings of the input.
            items: The items; None reads the file.

        Raises:
            ConfigurationError: An item sets a closed field.
            InputError: The input cannot be read.
        """
        if not config.is_batch:
            return
        source = open_source(config, (), items)
        for position, row in source.rows():
            kind = REQUEST_KINDS.get(row["url"])
            known = (
                _QUESTION_FIELDS
                if kind is None
                else _QUESTION_FIELDS.union(kind.inputs, kind.required)
            )
            keys = (f"{_SAMPLED}.{name}" for name in row["body"] if name not in known)
            if closed := [key for key in keys if not self.is_open(key)]:
                raise self._refusal(source.describe_position(position), closed)

    def _resolve_path(self, key: str, text: object, base: Path | None = None) -> str:
        if not isinstance(text, str) or not text or "\0" in text:
            raise ConfigurationError(f"{key}: name a file or a folder")
        if self.is_open(key):
            return str((base or Path.cwd()) / text)
        if self.root is None:
            msg = (
                f"{key}: a request may not name files here; the owner of the graph can open a "
                f"folder with {ROOT_ENV} in the server's environment"
            )
            raise ConfigurationError(msg)
        return str(resolve_below(self.root, text, key, base))

    # -- from a request to settings -----------------------------------------------------------

    def apply_request(self, owner: LoadedConfig, request: CallerSettings) -> LoadedConfig:
        """Return the bound settings with a request applied; blocks.

        Closed settings stay as bound, and settings that a request may only lower are at most the
        bound value.

        Args:
            owner: The bound settings.
            request: The request.

        Raises:
            ConfigurationError: The request exceeds its rights, or the settings do not fit.
        """
        if request.is_empty:
            return owner
        if lost := list(find_lost_secrets(request.settings)):
            msg = (
                f"{', '.join(lost)}: an earlier request of this run set it to a secret, which the "
                "run folder does not keep; give it again in the context"
            )
            raise ConfigurationError(msg)
        raw = copy.deepcopy(owner.raw)
        if request.preset is not None:
            _apply_preset(raw, owner, resolve_config(request.preset)[0])
        elif request.config:
            _clear_task(raw)
        changes = dict[str, Any]()
        if _changes_hosts(request):
            _remove_secrets(raw, request)
        for key, value in request.settings.items():
            if key == "input.path" and value is not None:
                changes["input.dataset"] = None
            if key in _SECRETS and not (
                isinstance(value, str) and re.fullmatch(VARIABLE_PATTERN, value)
            ):
                raise ConfigurationError(f"{key}: name a variable, as ${{MY_KEY}}")
            if key == "endpoints.hosts" and "$" in str(value):
                raise ConfigurationError(f"{key}: a request names hosts, not variables")
            if key in _INLINED and isinstance(value, str):
                read = read_schema if key == "task.schema" else read_examples
                value = read(Path(value), "context")  # noqa: PLW2901 - replaces the path
            changes[key] = value if key in _SECRETS else escape_variables(value)
        loaded = load_config(raw, settings=changes)
        self._check_result(owner.config, loaded.config, request)
        return replace(loaded, source=owner.source if request.preset is None else request.preset)

    def _check_result(self, owner: RunConfig, asked: RunConfig, request: CallerSettings) -> None:
        """Check the resulting settings, however the request spelled them.

        Raises:
            ConfigurationError: A closed setting differs from the bound one, or a setting that may
                only be lowered is higher.
        """
        before, after = owner.model_dump(by_alias=True), asked.model_dump(by_alias=True)
        given_task = request.preset is not None or request.config
        preset_stages = None
        if request.preset is not None:
            preset_stages = resolve_config(request.preset)[0].config.stages
        code = [
            f"reduce.{n} ({stage.op})"
            for n, stage in enumerate(asked.reduce)
            if isinstance(stage, FinalReducerConfig) and stage not in owner.reduce
        ]
        if code:
            msg = (
                f"context: {', '.join(code)}: a request may not contain queries or functions; only "
                "those bound to the graph run"
            )
            raise ConfigurationError(msg)
        closed = [
            f"reduce.{n}.{key}"
            for n, stage in enumerate(asked.reduce)
            for key in stage.model_fields_set
            if type(stage).access.get(key) is not Access.OPEN
            and stage not in owner.reduce
            and not self.is_open("reduce")
        ]
        for key, access in iter_access():
            old, new = (get_at_path(data, key.split(".")) for data in (before, after))
            if self.is_open(key) or new == old:
                continue
            if key == "endpoints.api_key" and new.get_secret_value() == "EMPTY":
                continue
            if key in _BOUND and new is None:
                continue
            if access is Access.LOWER and old is not None and (new is None or new > old):
                requested = "no limit" if new is None else f"{new:g}"
                msg = (
                    f"{key}: a request may only lower it: the graph is bound to {old:g}, the "
                    f"request asks for {requested}; the owner can open it with {ALLOW_ENV}={key}"
                )
                raise ConfigurationError(msg)
            if access is Access.MODEL and new not in _bound_models(owner):
                bound = ", ".join(sorted(_bound_models(owner))) or "none"
                msg = (
                    f"{key}: a request may choose among the models bound to the graph ({bound}); "
                    f"the owner can open it with {ALLOW_ENV}={key}"
                )
                raise ConfigurationError(msg)
            if key == "input.dataset" and asked.input.path is not None:
                continue
            if access is Access.SAMPLING:
                names = new.keys() if _changes_hosts(request) else new.keys() | old.keys()
                changed = {name for name in names if new.get(name) != old.get(name)}
                alien = (f"{key}.{name}" for name in sorted(changed - SAMPLING_FIELDS))
                closed += [name for name in alien if not self.is_open(name)]
            free = given_task and (
                key == "name"
                or key.startswith(("input.", "endpoints.simulated."))
                or (key == "stages" and asked.stages in (None, preset_stages))
            )
            if access in (Access.CLOSED, None) and not free:
                closed.append(key)
        if closed:
            raise self._refusal("context", closed)

    # -- budgets ------------------------------------------------------------------------------

    def check_answer(self, owner: LoadedConfig, answer: object) -> str | None:
        """Return why an answer about an exhausted budget is refused, or None."""
        if not isinstance(answer, Mapping) or answer.keys() - {
            key for key, _ in SETTING_UNITS.values()
        }:
            return None  # the budget reports invalid answers
        try:
            asked = BudgetConfig.model_validate(dict(answer))
        except ValidationError:
            return None
        for key in asked.model_fields_set:
            most, more = getattr(owner.config.budget, key), getattr(asked, key)
            if most is None or self.is_open(f"budget.{key}") or (more is not None and more <= most):
                continue
            return (
                f"{key}: at most {most:g}, the total bound to the graph; the owner can bind more, "
                f"open it with {ALLOW_ENV}=budget.{key}, or trust the answers of an invocation: "
                "build_graph(…, trust_context=True)"
            )
        return None

    def bound_totals(self, owner: LoadedConfig) -> dict[str, float]:
        """Return the totals that an answer cannot raise, by name."""
        totals = ((key, getattr(owner.config.budget, key)) for key, _ in SETTING_UNITS.values())
        return {
            k: most for k, most in totals if most is not None and not self.is_open(f"budget.{k}")
        }

    def limit_question(self, owner: LoadedConfig, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the question about an exhausted budget, with the limits that no answer can raise.

        Args:
            owner: The bound settings.
            asked: The question.
        """
        budget = owner.config.budget
        stuck = [
            key
            for key, about in asked["budget"].items()
            if (most := getattr(budget, key)) is not None
            and not self.is_open(f"budget.{key}")
            and about["cap"] >= most
        ]
        if not stuck:
            return asked
        keys = ",".join(f"budget.{key}" for key in stuck)
        note = (
            f"{', '.join(stuck)}: the graph is bound to this total, and no answer raises it; the "
            f"owner can bind more, open it with {ALLOW_ENV}={keys}, or trust the answers of an "
            "invocation: build_graph(…, trust_context=True)"
        )
        begin = asked["why"] if len(stuck) == len(asked["budget"]) else asked["question"]
        return asked | {"question": f"{begin.removesuffix('.')}. {note}"}


def resolve_below(root: Path, text: str, what: str, base: Path | None = None) -> Path:
    """Return a path inside a folder, with links resolved; blocks.

    Args:
        root: The folder.
        text: The path, relative to ``base`` or else to the folder.
        what: Name of the path in messages.
        base: Another folder inside the root that the path is relative to.

    Raises:
        InputError: The path, or a file in it, is outside the folder.
    """
    outside = InputError(f"{what}: is outside the folder that requests may read")
    try:
        root = root.resolve()
        full = ((base or root) / text).resolve()
        if not full.is_relative_to(root):
            raise outside
        if not full.exists() and is_pattern(full):
            for match in find_matches(full):
                if not (full.parent / match).resolve().is_relative_to(root):
                    raise outside
        if full.is_dir():
            for parent, _, names in os.walk(full):
                for name in names:
                    if not (Path(parent) / name).resolve().is_relative_to(root):
                        raise outside
    except (OSError, RuntimeError, ValueError):
        raise outside from None
    return full


def _changes_hosts(request: CallerSettings) -> bool:
    """Return True if a request changes where requests to the model go."""
    keys = (key for key in request.settings if key.startswith("endpoints."))
    return any(_NO_ADDRESS.fullmatch(key) is None for key in keys)


def _gives_token(request: CallerSettings) -> bool:
    """Return True if a request gives the token of a gateway itself."""
    first = request.settings.get("endpoints.first")
    inner = first if isinstance(first, dict) else {}
    values = [inner.get("token"), inner.get("token_command")]
    return any(value is not None for value in (*values, *map(request.settings.get, _BOUND)))


def _uses_gateway(request: CallerSettings, is_bound: bool) -> bool:
    """Return True if a request uses a gateway, by itself or by the bound settings."""
    keys = [key for key in request.settings if f"{key}.".startswith("endpoints.first.")]
    if "endpoints.first" in request.settings:
        return request.settings["endpoints.first"] is not None
    return is_bound or bool(keys)


def _remove_secrets(raw: dict[str, Any], request: CallerSettings) -> None:
    """Remove from the bound settings the secrets and commands for the bound hosts.

    Raises:
        ConfigurationError: A gateway would have no token.
    """
    endpoints = raw["endpoints"]
    endpoints.pop("api_key", None)
    bound = None
    if isinstance(first := endpoints.get("first"), dict):
        bound = [key for key in ("token", "token_command") if first.pop(key, None) is not None]
    if not _gives_token(request) and _uses_gateway(request, bound is not None):
        name = (
            f"endpoints.first.{bound[0]}: the bound one" if bound else "endpoints.first: the login"
        )
        msg = (
            f"{name} is for the bound gateway only, and the request chooses another address; the "
            "owner can open endpoints.first.token, so that a request names a variable of its own"
        )
        raise ConfigurationError(msg)
    body = (raw.get("model") or {}).get("extra_body")
    if isinstance(body, dict):
        kept = {name: part for name, part in body.items() if not _holds_secret(name, part)}
        raw["model"]["extra_body"] = kept


def _holds_secret(key: str, value: Any) -> bool:
    """Return True if a bound value contains a secret or a reference to a variable."""
    if isinstance(value, Mapping):
        return any(_holds_secret(str(name), part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return any(_holds_secret(key, part) for part in value)
    if not isinstance(value, str):
        return False
    return is_secret(key) or bool(REFERENCE_START.search(value)) or mask_command(value) != value


def _mask(key: str, value: Any) -> Any:
    """Return a setting of a request without its secrets."""
    if key.startswith(("task.", "endpoints.models")):
        return value
    if key in _COMMANDS and isinstance(value, str):
        return mask_command(value)
    return mask_data(value, key.rpartition(".")[2])


def _apply_preset(raw: dict[str, Any], owner: LoadedConfig, preset: LoadedConfig) -> None:
    """Replace the bound task by that of a preset; keep the bound endpoints and backend."""
    _clear_task(raw)
    for key in ("name", "reduce", "evaluate", "stages", "task", "model", "input"):
        given, kept = copy.deepcopy(preset.raw.get(key)), raw.get(key)
        if isinstance(given, dict) and isinstance(kept, dict):
            raw[key] = given | {k: v for k, v in kept.items() if v is not None}
        elif given is not None:
            raw[key] = given
    samples = min(one.config.task.samples for one in (owner, preset))
    if raw["task"].get("samples") is not None:
        raw["task"]["samples"] = samples
    limits = [one.config.input.limit for one in (owner, preset)]
    raw["input"]["limit"] = min((n for n in limits if n is not None), default=None)
    if owner.preset is not None and owner.config.endpoints.simulated is not None:
        raw["endpoints"] = preset.raw["endpoints"]


def _clear_task(raw: dict[str, Any]) -> None:
    """Remove from the bound settings what a request with its own task replaces."""
    task, model, input_ = (raw.get(key) or {} for key in ("task", "model", "input"))
    raw["task"] = {"graph": task["graph"]} if task.get("graph") else {}
    raw["model"] = {k: model[k] for k in ("name", "price", "extra_body") if k in model}
    raw["input"] = {"limit": input_["limit"]} if input_.get("limit") else {}
    for key in ("reduce", "evaluate", "stages"):
        raw.pop(key, None)


def _iter_sampling(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the request body that a key sets: all of them, or one."""
    if key != _SAMPLED:
        yield key.removeprefix(f"{_SAMPLED}.").partition(".")[0], value
    elif isinstance(value, Mapping):
        yield from value.items()
    else:
        raise ConfigurationError(f"{key}: give a mapping")


def _bound_models(owner: RunConfig) -> set[str]:
    names = {owner.model.name, *owner.endpoints.models.values()}
    return {name for name in names if name is not None}


def _setting_key(name: str) -> str:
    """Return the setting of a field of the context, or the field's own name."""
    return str(FORM_FIELDS[name].get("key", "endpoints.api_key" if name == "api_key" else name))


def _field_access(name: str) -> Access:
    about = FORM_FIELDS[name]
    if "key" in about:
        ((_, _, access),) = split_settings(about["key"], None)
        return access
    return Access(about.get("access", Access.CLOSED))


def _list_openable_keys() -> set[str]:
    """Return every key that an owner can open."""
    keys = {key for key, _ in iter_access()}
    parts = (key.split(".") for key in keys)
    sections = {".".join(part[:n]) for part in parts for n in range(1, len(part))}
    alone = {_setting_key(name) for name, about in FORM_FIELDS.items() if "access" in about}
    return keys | sections | alone


def _is_entry(key: str) -> bool:
    """Return True if a key names an entry within a setting: ``model.extra_body.priority``."""
    try:
        return bool(list(split_settings(key, None)))
    except ConfigurationError:
        return False


FORM_FIELDS: Final[dict[str, Mapping[str, Any]]] = {
    f.name: f.metadata for f in fields(SettingsForm) if f.init
}
