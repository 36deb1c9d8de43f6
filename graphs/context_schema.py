"""The settings that a form can fill in, each with its description, default, bounds and choices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Final, Literal, get_type_hints

import orjson
from pydantic_core import PydanticUndefined

from ..backends.core.errors import ConfigurationError
from ..configs.base import Access
from ..configs.describe import describe_setting, find_setting, section_schema, setting_schema
from ..configs.loader import preset_names
from ..configs.resolve import DEFAULT_PRESET
from ..nodes.context import Context

VARIABLE_PATTERN: Final = r"^(\$\{[A-Za-z_][A-Za-z0-9_]*\})?$"
"""A reference to a variable of the environment, or nothing."""

_SECRETS: Final = ("api_key", "token", "password")
_DATASETS: Final = ("rdkit-nci5k", "molecules", "abstracts", "topics", "records")


def _plain_field(start: Any, text: str, access: Access, **more: Any) -> Any:
    """Return a field that no single setting stands behind."""
    return _field(start, {"description": text, "access": access, "json_schema_extra": more})


def _setting_field(key: str, **more: Any) -> Any:
    """Return a field that stands for one setting, and says of it what the setting's model says."""

    def show(shown: dict[str, Any]) -> None:
        for word in ("type", "anyOf", "items", "additionalProperties"):
            shown.pop(word, None)
        shown |= setting_schema(key) | more
        if isinstance(default, list | dict):
            shown["default"] = default  # pydantic keeps what a factory makes to itself

    default = find_setting(key).get_default(call_default_factory=True)
    if default is PydanticUndefined:
        default = ""
    about = {"description": describe_setting(key), "key": key, "json_schema_extra": show}
    return _field(default, about)


def _options(key: str, text: str, *elsewhere: str) -> Any:
    """Return a field for the settings of a section that no field of their own stands for."""
    shown = section_schema(key)
    for name in elsewhere:
        del shown["properties"][name]
    about = {"description": text, "json_schema_extra": {"anyOf": [shown, {"type": "null"}]}}
    return field(default=None, metadata=about | {"section": key})


def _field(default: Any, about: dict[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass(kw_only=True)
class SettingsForm(Context):
    """Settings of a run: a preset or a file, and what shall be different.

    A field that is left as it is changes nothing; so ``overrides`` is the way to set something
    back to its default.
    """

    preset: str = _plain_field(
        DEFAULT_PRESET, "Which use case to start from.", Access.OPEN, enum=preset_names()
    )
    config: str | dict[str, Any] | None = _plain_field(
        None, "In place of a preset: a YAML file, or the settings themselves.", Access.PATH
    )
    system: str = _setting_field(
        "task.system", langgraph_nodes=["shard", "infer"], langgraph_type="prompt"
    )
    prompt: str = _setting_field(
        "task.prompt", minLength=0, langgraph_nodes=["shard", "prepare"], langgraph_type="prompt"
    )
    answer_schema: dict[str, Any] | None = _setting_field("task.schema")
    repairs: int = _setting_field("task.repairs")
    reduce: list[dict[str, Any]] = _setting_field("reduce", items={"type": "object"})
    dataset: str | None = _setting_field("input.dataset", examples=list(_DATASETS))
    id_column: str | None = _setting_field("input.id")
    smiles_column: str | None = _setting_field("input.smiles")
    limit: int | None = _setting_field("input.limit")
    on_duplicate: Literal["error", "first", "suffix"] = _setting_field("input.on_duplicate")
    model: str | None = _setting_field("model.name", langgraph_nodes=["shard", "infer"])
    temperature: float = _setting_field("model.temperature")
    max_tokens: int = _setting_field("model.max_tokens")
    seed: int | None = _setting_field("model.seed")
    endpoints: str = _plain_field(
        "",
        "Where the model is served: base URLs with commas between, an endpoints file, auto, or "
        "simulated; empty: as the preset or file says.",
        Access.CLOSED,
        examples=["http://node17:8000/v1,http://node18:8000/v1", "endpoints.txt", "auto"],
    )
    api_key: str = _plain_field(
        "",
        "Key of the endpoints, as ${VAR}: the name of a variable of the server's environment, "
        "never the key itself.",
        Access.CLOSED,
        pattern=VARIABLE_PATTERN,
        examples=["${MY_KEY}"],
    )
    price: dict[str, Any] | None = _setting_field("model.price")
    usd: float | None = _setting_field("budget.usd")
    tokens: int | None = _setting_field("budget.tokens")
    requests: int | None = _setting_field("budget.requests")
    node_hours: float | None = _setting_field("budget.node_hours")
    on_limit: Literal["pause", "stop"] = _setting_field("budget.on_limit")
    warn_at: list[float] = _setting_field("budget.warn_at")
    streams: int = _setting_field("limits.streams")
    attempts: int = _setting_field("limits.attempts")
    request_timeout_s: float = _setting_field("limits.request_timeout_s")
    drain_s: float = _setting_field("limits.drain_s")
    fleet_wait_s: float = _setting_field("limits.fleet_wait_s")
    walltime_s: float | None = _setting_field("limits.walltime_s")
    margin_s: float = _setting_field("limits.margin_s")
    item_timeout_s: float | None = _setting_field("limits.item_timeout_s")
    steps_per_item: int | None = _setting_field("limits.steps_per_item")
    body_bytes: int = _setting_field("limits.body_bytes")
    hedge: bool = _setting_field("limits.hedge")
    requests_per_s: float | None = _setting_field("limits.requests_per_s")
    tokens_per_min: float | None = _setting_field("limits.tokens_per_min")
    endpoint_streams: int | None = _setting_field("limits.endpoint_streams")
    endpoint_requests_per_s: float | None = _setting_field("limits.endpoint_requests_per_s")
    endpoint_tokens_per_min: float | None = _setting_field("limits.endpoint_tokens_per_min")
    retry_budget: float | None = _setting_field("limits.retry_budget")
    affinity: int | None = _setting_field("limits.affinity")
    load: Literal["metrics", "load"] | None = _setting_field("limits.load")
    backend: Literal["local", "executor", "parsl", "globus_compute", "academy", "launched"] = (
        _setting_field("backend.kind")
    )
    processes: int = _setting_field("backend.processes")
    workers: int = _setting_field("backend.workers")
    shard_items: int | None = _setting_field("shard.items")
    cache: str = _setting_field("cache")
    cache_sampled: bool = _setting_field("cache_sampled")
    run_name: str = _setting_field("name")
    graph: str | None = _setting_field("task.graph")
    extra_body: dict[str, Any] = _setting_field("model.extra_body")
    endpoint_options: dict[str, Any] | None = _options(
        "endpoints", "Where the model is served, in more detail than one line can say."
    )
    backend_options: dict[str, Any] | None = _options(
        "backend", "Where shards run, in more detail.", "kind", "processes", "workers"
    )
    node: dict[str, Any] | None = _options("node", "How a node serves the model.")
    fsync_s: float = _setting_field("journal.fsync_s")
    keep_raw: Literal["rejected", "all"] = _setting_field("keep.raw")
    metrics_port: int | None = _setting_field("metrics.port")
    overrides: list[str] = _plain_field(
        [],
        "Every other setting, as key.of.section=value; docs/configuration.md lists the keys.",
        Access.OPEN,
        default=[],
        examples=[["model.extra_body={top_k: 20}", "endpoints.proxy=true"]],
    )
    out: str | None = _plain_field(
        None,
        "Folder of the run, on the server: a new one, or that of a run to go on with; empty: a new "
        "one below fanfold-runs.",
        Access.CLOSED,
    )
    trace: bool = _plain_field(
        False,
        "Run every item by LangGraph's engine, visible in traces, however many there are.",
        Access.CLOSED,
    )
    retry_failed: bool = _plain_field(
        False, "On a run that goes on: ask failed items again.", Access.CLOSED
    )

    def to_assignments(self) -> list[str]:
        """Return what differs from the preset or file, as ``key.of.section=value``.

        Raises:
            ConfigurationError: A key that was written out.
        """
        filled = self.changed_fields()
        keys = {f.name: f.metadata["key"] for f in fields(self) if "key" in f.metadata}
        changed = [f"{keys[n]}={orjson.dumps(filled[n]).decode()}" for n in keys if n in filled]
        for one in fields(self):
            given = filled.get(one.name) if "section" in one.metadata else None
            for name, value in (given or {}).items():
                _check_secrets({name: value})
                changed.append(f"{one.metadata['section']}.{name}={orjson.dumps(value).decode()}")
        if self.api_key:
            changed.append(f"endpoints.api_key={_check_variable(self.api_key)}")
        return [*changed, *self.overrides]

    def changed_fields(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, by name; an emptied one does not."""
        return {
            name: value
            for name, default in _field_defaults(type(self)).items()
            if (value := getattr(self, name)) != default and (default, value) != (None, "")
        }


def build_request_form(shown: Callable[[str], bool], preset: str | None) -> type[Any]:
    """Return the form that a graph shows to those who may not set everything.

    Args:
        shown: Says of a field's name whether it is shown.
        preset: The preset that the graph is bound to, the default of that field.
    """
    hints = get_type_hints(SettingsForm)
    made = [
        (one.name, hints[one.name], _copy_field(one, preset))
        for one in fields(SettingsForm)
        if one.init and shown(one.name)
    ]
    return make_dataclass("Settings", made, kw_only=True)


def _copy_field(of: Field[Any], preset: str | None) -> Any:
    if of.name == "preset":
        about = dict(of.metadata) | {"description": "Which use case to run in place of the bound."}
        return field(default=preset or "", metadata=about)
    if of.default_factory is not MISSING:
        return field(default_factory=of.default_factory, metadata=of.metadata)
    return field(default=of.default, metadata=of.metadata)


@cache
def _field_defaults(form: type[SettingsForm]) -> dict[str, Any]:
    """Return the defaults by field; looked up once, for every node of every shard asks."""
    return {f.name: _field_default(f) for f in fields(form) if f.init}


def _field_default(of: Field[Any]) -> Any:
    if of.default_factory is not MISSING:
        return of.default_factory()
    return of.default


def _check_secrets(given: Any) -> None:
    """Refuse secrets that are written out, at any depth.

    Raises:
        ConfigurationError: There is one.
    """
    for key, value in given.items() if isinstance(given, dict) else ():
        if key in _SECRETS and isinstance(value, str):
            _check_variable(value)
        _check_secrets(value)


def _check_variable(text: str) -> str:
    """Return the reference to a variable.

    Raises:
        ConfigurationError: It is something else; servers keep what was typed into a form.
    """
    if not re.fullmatch(VARIABLE_PATTERN, text):
        msg = (
            "keys: name a variable of the server's environment, as ${MY_KEY}; a key that is "
            "typed in here would be kept in the server's files"
        )
        raise ConfigurationError(msg)
    return text
