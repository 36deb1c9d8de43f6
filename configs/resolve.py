"""Resolve a configuration: a preset, file or mapping plus the options given with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..backends.core.errors import ConfigurationError, MissingExtraError
from .base import expand_home
from .endpoints import AEGIS_REGISTRY_FILE, ENDPOINT_KINDS, HOSTS_ONLY_KEYS
from .loader import LoadedConfig, check_settings, override_settings
from .raw_settings import get_at_path, read_settings
from .task_check import find_sample_warnings, find_task_warnings

DEFAULT_PRESET: Final = "quickstart"

NO_RDKIT: Final = (
    "rdkit is not installed: 20 molecules that ship with fanfold take the place of the 4,991, "
    "and the simulated answers are random. pip install 'fanfold[chem]' for the full example."
)


def resolve_config(
    config: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    input_path: str | None = None,
    limit: int | None = None,
    endpoints: str | None = None,
) -> tuple[LoadedConfig, list[str]]:
    """Load a configuration with the options given with it.

    Args:
        config: A preset's name, a file, settings, or None for quickstart.
        overrides: ``a.b=value`` assignments.
        input_path: Input that replaces the configured one.
        limit: Number of items to take from the beginning.
        endpoints: ``simulated``, ``auto``, an endpoints file, or base URLs separated by commas.

    Returns:
        The configuration, and notices for the user.

    Raises:
        ConfigurationError: A setting is invalid; or a preset has a user's input without a user's
            endpoints.
    """
    config = DEFAULT_PRESET if config is None else config
    raw = override_settings(read_settings(config), overrides)
    data, preset = raw.data, raw.preset
    settings, notices = _input_settings(input_path, limit), list[str]()
    simulated = get_at_path(data, ("endpoints", "simulated"))
    if endpoints is not None:
        settings |= endpoint_settings(endpoints, simulated)
    if preset and simulated is not None and endpoints in (None, "simulated"):
        has_input = input_path is not None or get_at_path(data, ("input", "path")) is not None
        if has_input and endpoints is None:
            raise ConfigurationError(_needs_endpoints(preset))
        notices.append(_simulated_notice(preset))
        if find_spec("rdkit") is None:
            more, notice = _replace_rdkit(data, has_input)
            settings |= more
            notices += notice
    loaded = check_settings(raw, settings)
    config_warnings = find_sample_warnings(loaded.config)
    return loaded, notices + find_task_warnings(loaded.config.task) + config_warnings


def _input_settings(input_path: str | None, limit: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {} if limit is None else {"input.limit": limit}
    if input_path == "":
        raise ConfigurationError("--input is empty; name a file or a folder")
    if input_path is not None:
        path = str(expand_home(input_path).absolute())
        settings |= {"input.path": path, "input.dataset": None}
    return settings


def _needs_endpoints(preset: str) -> str:
    return (
        f"preset {preset} runs on a simulated fleet; for an input of your own say where the "
        "model is served: --endpoints URLS|FILE (or --endpoints simulated)"
    )


def endpoint_settings(text: str, simulated: object) -> dict[str, Any]:
    """Return the settings that an ``--endpoints`` option means; the API key is unchanged.

    Args:
        text: ``simulated``, ``auto``, an endpoints file (also one that Aegis has not written yet),
            a folder of such files, or base URLs separated by commas.
        simulated: The configured simulated fleet, kept if there is one.

    Raises:
        ConfigurationError: It is none of these.
    """
    kinds: dict[str, Any] = dict.fromkeys((*ENDPOINT_KINDS, *HOSTS_ONLY_KEYS))
    if text == "simulated":
        kinds["simulated"] = simulated or {}
    elif text == "auto":
        kinds["auto"] = True
    elif "://" in text:
        kinds["urls"] = [url.strip() for url in text.split(",") if url.strip()]
    else:
        path = expand_home(text)
        beside = {folder / AEGIS_REGISTRY_FILE for folder in (path.parent, path.resolve().parent)}
        is_awaited = bool(path.suffix) and any(file.is_file() for file in beside)
        if not text or not (path.exists() or is_awaited):
            msg = (
                f"--endpoints {text!r}: neither 'simulated' nor 'auto', nor URLs such as "
                "http://node17:8000/v1 (several with commas between), nor a file or folder"
            )
            raise ConfigurationError(msg)
        kinds["file"] = str(path.resolve() if path.exists() else path.absolute())
    return {f"endpoints.{kind}": value for kind, value in kinds.items()}


def _simulated_notice(preset: str) -> str:
    return (
        f"preset {preset}: SIMULATED FLEET. The answers come from no language model, "
        "cost nothing and mean nothing; give --endpoints to use a real one."
    )


def _replace_rdkit(data: dict[str, Any], has_input: bool) -> tuple[dict[str, Any], list[str]]:
    changed = dict[str, Any]()
    if get_at_path(data, ("input", "dataset")) == "rdkit-nci5k" and not has_input:
        changed["input.dataset"] = "molecules"
    for path in _list_endpoint_paths(data):
        responder = (*path, "simulated", "responder")
        if get_at_path(data, responder) == "esol":
            changed[".".join(map(str, responder))] = "schema"
    return changed, [NO_RDKIT] if changed else []


def _list_endpoint_paths(data: Mapping[str, Any]) -> list[tuple[str | int, ...]]:
    """Return where a preset may have endpoints."""
    found: list[tuple[str | int, ...]] = [("endpoints",)]
    for number in range(len(data.get("stages") or ())):
        stage = ("stages", number)
        found += [(*stage, "endpoints"), (*stage, "cascade", "small", "endpoints")]
    return found


def check_metrics() -> None:
    """Check that metrics can be served.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """
    if find_spec("prometheus_client") is None:
        raise MissingExtraError("--metrics-port", "metrics")
