"""Settings that a form shows, each with its description, default, bounds and choices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Final, Literal, get_type_hints

import orjson
from pydantic_core import PydanticUndefined

from ..backends.core.errors import ConfigurationError
from ..configs.backend import BackendKind
from ..configs.base import Access
from ..configs.describe import describe_setting, find_setting, section_schema, setting_schema
from ..configs.preset_files import preset_names
from ..configs.raw_settings import check_overrides
from ..configs.resolve import DEFAULT_PRESET
from ..nodes.context import Context

VARIABLE_PATTERN: Final = r"^(\$\{[A-Za-z_][A-Za-z0-9_]*\})?$"
"""Pattern of a reference to an environment variable, or of an empty text."""

_SECRETS: Final = ("api_key", "token", "password")
_DATASETS: Final = ("rdkit-nci5k", "molecules", "abstracts", "topics", "records")


def _plain_field(start: Any, text: str, access: Access, **more: Any) -> Any:
    """Return a field that does not map to one setting."""
    return _field(start, {"description": text, "access": access, "json_schema_extra": more})


def _setting_field(key: str, **more: Any) -> Any:
    """Return a field for one setting, with the schema of the setting's model."""

    def show(shown: dict[str, Any]) -> None:
        for word in ("type", "anyOf", "items", "additionalProperties"):
            shown.pop(word, None)
        shown |= setting_schema(key) | more
        if isinstance(default, list | dict):
            shown["default"] = default  # pydantic omits defaults made by a factory

    default = find_setting(key).get_default(call_default_factory=True)
    if default is PydanticUndefined:
        default = ""
    about = {"description": describe_setting(key), "key": key, "json_schema_extra": show}
    return _field(default, about)


def _options(key: str, text: str, *excluded: str) -> Any:
    """Return a field for the settings of a section that have no field of their own."""

    def show(shown: dict[str, Any]) -> None:
        section = section_schema(key)
        for name in excluded:
            del section["properties"][name]
        shown["anyOf"] = [section, {"type": "null"}]

    about = {"description": text, "json_schema_extra": show}
    return field(default=None, metadata=about | {"section": key})


def _field(default: Any, about: dict[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass(kw_only=True)
class SettingsForm(Context):
    """Settings of a run: a preset or a file, and changes to it.

    A field at its default changes nothing, so use ``overrides`` to set a value back to its
    default.
    """

    preset: str = _plain_field(
        DEFAULT_PRESET, "Preset to start from.", Access.OPEN, enum=preset_names()
    )
    config: str | dict[str, Any] | None = _plain_field(
        None, "YAML file or settings to use instead of a preset.", Access.PATH
    )
    system: str = _setting_field(
        "task.system", langgraph_nodes=["shard", "infer"], langgraph_type="prompt"
    )
    prompt: str = _setting_field(
        "task.prompt", minLength=0, langgraph_nodes=["shard", "prepare"], langgraph_type="prompt"
    )
    messages: list[dict[str, Any]] | None = _setting_field(
        "task.messages", langgraph_nodes=["shard", "prepare"]
    )
    examples: list[dict[str, Any]] | None = _setting_field("task.examples")
    answer_schema: dict[str, Any] | None = _setting_field("task.schema")
    repairs: int = _setting_field("task.repairs")
    samples: int = _setting_field("task.samples")
    fold: str | dict[str, str] | None = _setting_field("task.fold")
    certainty: str | None = _setting_field("task.certainty")
    images: list[str] | dict[str, Any] | None = _setting_field("task.images")
    reduce: list[dict[str, Any]] = _setting_field("reduce", items={"type": "object"})
    evaluate: list[dict[str, Any]] | None = _setting_field("evaluate")
    dataset: str | None = _setting_field("input.dataset", examples=list(_DATASETS))
    input_format: Literal["auto", "openai_batch"] = _setting_field("input.format")
    id_column: str | None = _setting_field("input.id")
    smiles_column: str | None = _setting_field("input.smiles")
    limit: int | None = _setting_field("input.limit")
    on_duplicate: Literal["error", "first", "suffix"] = _setting_field("input.on_duplicate")
    quotes: Literal["auto"] | bool = _setting_field("input.quotes")
    model: str | None = _setting_field("model.name", langgraph_nodes=["shard", "infer"])
    temperature: float | None = _setting_field("model.temperature")
    max_tokens: int = _setting_field("model.max_tokens")
    max_tokens_field: Literal["auto", "max_tokens", "max_completion_tokens"] = _setting_field(
        "model.max_tokens_field"
    )
    system_role: Literal["system", "developer", "user"] = _setting_field("model.system_role")
    seed: int | None = _setting_field("model.seed")
    endpoints: str = _plain_field(
        "",
        "Endpoints that serve the model: comma-separated base URLs, an endpoints file, auto, or "
        "simulated; empty: the endpoints of the preset or file.",
        Access.CLOSED,
        examples=["http://node17:8000/v1,http://node18:8000/v1", "endpoints.txt", "auto"],
    )
    api_key: str = _plain_field(
        "",
        "API key of the endpoints, as ${VAR}: the name of an environment variable of the server, "
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
    order: Literal["auto", "input"] = _setting_field("limits.order")
    load: Literal["metrics", "load"] | None = _setting_field("limits.load")
    backend: BackendKind = _setting_field("backend.kind")
    processes: int = _setting_field("backend.processes")
    workers: int = _setting_field("backend.workers")
    shard_items: int | None = _setting_field("shard.items")
    cache: str = _setting_field("cache")
    cache_sampled: bool = _setting_field("cache_sampled")
    run_name: str = _setting_field("name")
    graph: str | None = _setting_field("task.graph")
    extra_body: dict[str, Any] = _setting_field("model.extra_body")
    endpoint_options: dict[str, Any] | None = _options(
        "endpoints", "All settings of the section endpoints."
    )
    backend_options: dict[str, Any] | None = _options(
        "backend", "Other settings of the section backend.", "kind", "processes", "workers"
    )
    batch: dict[str, Any] | None = _options(
        "batch", "Output files in OpenAI's batch format, for input_format openai_batch."
    )
    node: dict[str, Any] | None = _options("node", "Settings of the model servers on a node.")
    fsync_s: float = _setting_field("journal.fsync_s")
    keep_raw: Literal["rejected", "all"] = _setting_field("keep.raw")
    metrics_port: int | None = _setting_field("metrics.port")
    overrides: list[str] = _plain_field(
        [],
        "Any other setting, as section.key=value; see docs/configuration.md for the keys.",
        Access.OPEN,
        default=[],
        examples=[["model.extra_body={top_k: 20}", "endpoints.proxy=true"]],
    )
    out: str | None = _plain_field(
        None,
        "Run folder on the server: a new one, or that of a run to resume; empty: a new folder in "
        "fanfold-runs.",
        Access.CLOSED,
    )
    trace: bool = _plain_field(
        False,
        "Run every item through LangGraph's engine and trace it, for any number of items.",
        Access.CLOSED,
    )
    retry_failed: bool = _plain_field(
        False, "When resuming a run: retry failed items.", Access.CLOSED
    )

    def to_assignments(self) -> list[str]:
        """Return the changes to the preset or file, as ``section.key=value``.

        Raises:
            ConfigurationError: A secret is given in clear text.
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
        return [*changed, *check_overrides(self.overrides)]

    def changed_fields(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, by name, without cleared fields."""
        return {
            name: value
            for name, default in _field_defaults(type(self)).items()
            if (value := getattr(self, name)) != default and (default, value) != (None, "")
        }


def build_request_form(shown: Callable[[str], bool], preset: str | None) -> type[Any]:
    """Return the form of a graph whose requests can set only some fields.

    Args:
        shown: Returns True for the name of a field that the form shows.
        preset: The preset bound to the graph, the default of that field.
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
        about = dict(of.metadata) | {"description": "Preset to run instead of the bound one."}
        return field(default=preset or "", metadata=about)
    if of.default_factory is not MISSING:
        return field(default_factory=of.default_factory, metadata=of.metadata)
    return field(default=of.default, metadata=of.metadata)


@cache
def _field_defaults(form: type[SettingsForm]) -> dict[str, Any]:
    """Return the defaults by field; cached, because every node of every shard needs them."""
    return {f.name: _field_default(f) for f in fields(form) if f.init}


def _field_default(of: Field[Any]) -> Any:
    if of.default_factory is not MISSING:
        return of.default_factory()
    return of.default


def _check_secrets(given: Any) -> None:
    """Check that a value holds no secret in clear text, at any depth.

    Raises:
        ConfigurationError: It holds one.
    """
    for key, value in given.items() if isinstance(given, dict) else ():
        if key in _SECRETS and isinstance(value, str):
            _check_variable(value)
        _check_secrets(value)


def _check_variable(text: str) -> str:
    """Return a reference to an environment variable.

    Raises:
        ConfigurationError: It is not one; servers store what is typed into a form.
    """
    if not re.fullmatch(VARIABLE_PATTERN, text):
        msg = (
            "keys: name a variable of the server's environment, as ${MY_KEY}; the server would "
            "store a key that is typed in here"
        )
        raise ConfigurationError(msg)
    return text
