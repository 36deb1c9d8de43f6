"""Settings as plain data: checks, masked secrets, and the text of ``run.yaml``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pydantic import SecretStr

from ..backends.core.errors import ConfigurationError
from ..backends.core.secrets import MASKED, is_secret, mask_command, mask_data, mask_url
from .models import KeepConfig, RunConfig
from .raw_settings import join_path

_MOST_VALUES: Final = 1_000_000
_DEEPEST: Final = 100
_INTEGERS: Final = range(-(2**63), 2**64)
_NO_SECRETS: Final = (("endpoints", "models"),)
_COMMANDS: Final = (
    ("endpoints", "first", "token_command"),
    ("node", "serve"),
    ("backend", "command"),
)
_VARIABLES_ONLY: Final = re.compile(r"(?:\$\{[A-Za-z_][A-Za-z0-9_]*\})+")


def check_plain(data: Mapping[str, Any], source: str) -> None:
    """Check that settings contain only JSON values, and are not too large.

    YAML also allows dates, keys that are not text (``on: …`` is ``True``), infinities and aliases
    that expand without end.

    Args:
        data: The settings.
        source: Their name in messages.

    Raises:
        ConfigurationError: A value is invalid; names the key and a solution.
    """
    todo: list[tuple[tuple[str, ...], Any]] = [((), data)]
    seen = 0
    while todo:
        path, value = todo.pop()
        seen += 1
        if seen > _MOST_VALUES or len(path) > _DEEPEST:
            msg = (
                f"{source}: {'.'.join(path[:2])}: nested more than {_DEEPEST} levels deep or more "
                f"than {_MOST_VALUES:,} values (does a YAML alias expand without end?)"
            )
            raise ConfigurationError(msg)
        if isinstance(value, Mapping):
            todo += [((*path, str(k)), _member(source, path, k, v)) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            todo += [((*path, str(n)), v) for n, v in enumerate(value)]
        elif problem := _problem(value):
            raise ConfigurationError(f"{source}: {'.'.join(path)}: {problem}")


def _member(source: str, path: tuple[str, ...], key: object, value: Any) -> Any:
    if not isinstance(key, str):
        where = ".".join(path) or "at its top"
        msg = f"{source}: {where}: the key {key!r} is not text in YAML; put quotes around it"
        raise ConfigurationError(msg)
    return value


def _problem(value: object) -> str | None:
    """Return what is wrong with a value that is neither a mapping nor a list, or None."""
    if isinstance(value, str):
        return (
            None
            if _is_encodable(value)
            else "the text contains half a character (a lone surrogate)"
        )
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if value in _INTEGERS else "the number does not fit 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"the number must be finite (found {value})"
    kind = type(value).__name__
    return f"a {kind} is not a plain value (text, number, true, false, null); put quotes around it"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_plain(config: RunConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings, including defaults, with the strings as the user wrote them.

    Args:
        config: The checked settings.
        raw: The same as the user wrote them, ``${VAR}`` unexpanded.
    """
    settings = config.model_dump(mode="json", by_alias=True, exclude_none=False)
    if config.evaluate is None:  # run.yaml contains these only if they are set
        del settings["evaluate"]
    if config.keep == KeepConfig():
        del settings["keep"]
    if config.stages is None:
        del settings["stages"]
    elif "max_tokens" not in (raw.get("model") or {}):  # an operator then chooses its own
        del settings["model"]["max_tokens"]
    if config.budget.reserve_for_reduce == "auto":
        del settings["budget"]["reserve_for_reduce"]
    plain: dict[str, Any] = _unexpand(settings, raw)
    key = raw["endpoints"].get("api_key")
    plain["endpoints"]["api_key"] = _safe_key(key, config.endpoints.api_key)
    first = config.endpoints.first
    if first is not None and first.token is not None:
        written = raw["endpoints"]["first"]["token"]
        plain["endpoints"]["first"]["token"] = _safe_key(written, first.token)
    template = plain["backend"]["user_endpoint_config"]
    if template is not None:
        plain["backend"]["user_endpoint_config"] = _mask_secrets(template)
    password = config.backend.exchange.password
    if password is not None:
        written = raw["backend"]["exchange"]["password"]
        plain["backend"]["exchange"]["password"] = _safe_key(written, password)
    return mask_settings(plain)


def mask_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain settings in which every secret in plain text is masked.

    Names within the task and of models are chosen by the user and do not mark secrets.

    Args:
        plain: The settings, ``${VAR}`` unexpanded.
    """
    masked = {
        name: mask_data(value, name, mask_url if name == "reduce" else mask_command)
        for name, value in plain.items()
        if name not in _TEXTS
    }
    masked = {name: plain[name] if name in _TEXTS else masked[name] for name in plain}
    if plain.get("stages"):
        masked["stages"] = [_mask_stage(stage) for stage in plain["stages"]]
    for section, *names in _NO_SECRETS:
        _copy(plain[section], masked[section], names)
    for section, *names in _COMMANDS:
        _copy(plain[section], masked[section], names, mask_command)
    return masked


_TEXTS: Final = frozenset({"task", "stages"})
"""Sections whose names the user chooses."""


def _mask_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage, or the small model of a cascade, with masked secrets of its endpoints."""
    masked = dict(stage)
    if (cascade := stage.get("cascade")) is not None:
        masked["cascade"] = {**cascade, "small": _mask_stage(cascade["small"])}
    endpoints = stage.get("endpoints")
    if isinstance(endpoints, Mapping):
        masked["endpoints"] = mask_data(_mask_secrets(endpoints), "endpoints", mask_command)
        for name in ("models", "api_key"):
            if name == "models" and name in endpoints:
                masked["endpoints"][name] = endpoints[name]
        if endpoints.get("api_key") == "EMPTY":
            masked["endpoints"]["api_key"] = "EMPTY"
    if stage.get("model") is not None:
        masked["model"] = mask_data(stage["model"], "model", mask_command)
    return masked


def _copy(
    plain: Any, masked: Any, names: list[str], change: Callable[[str], str] | None = None
) -> None:
    """Copy the value at a path into masked settings; ``change`` is applied to a text."""
    *parents, last = names
    for name in parents:
        plain, masked = plain.get(name), masked.get(name)
        if plain is None:
            return
    value = plain[last]
    masked[last] = change(value) if change is not None and isinstance(value, str) else value


def find_lost_secrets(settings: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of expanded settings whose texts the run folder did not keep.

    Args:
        settings: Plain data.
        path: Its dotted key.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from find_lost_secrets(value, join_path(path, str(name)))
    elif isinstance(settings, list):
        for number, value in enumerate(settings):
            yield from find_lost_secrets(value, join_path(path, str(number)))
    elif isinstance(settings, str) and MASKED in settings:
        yield path


def _mask_secrets(plain: Any, key: str = "") -> Any:
    """Return plain data with the values of secret keys masked, unless they are variables."""
    if isinstance(plain, Mapping):
        below = key if is_secret(key) else None
        return {name: _mask_secrets(value, below or name) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_mask_secrets(value, key) for value in plain]
    if plain is None or isinstance(plain, bool) or not is_secret(key):
        return plain
    return plain if _VARIABLES_ONLY.fullmatch(str(plain)) else MASKED


def iter_secret_texts(data: Any, key: str = "") -> Iterator[str]:
    """Yield the texts within plain data that must not be shown.

    Args:
        data: The data, variables expanded.
        key: Its key.
    """
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from iter_secret_texts(value, key if is_secret(key) else name)
    elif isinstance(data, list):
        for value in data:
            yield from iter_secret_texts(value, key)
    elif isinstance(data, str) and data and is_secret(key):
        yield data


def find_masked_keys(plain: Any, where: str) -> Iterator[str]:
    """Yield the dotted keys of the secrets that plain settings do not keep.

    Args:
        plain: The settings, or a part of them.
        where: The key of the part.
    """
    if plain == MASKED:
        yield where
    elif isinstance(plain, Mapping):
        for key, value in plain.items():
            yield from find_masked_keys(value, f"{where}.{key}")
    elif isinstance(plain, list):
        for number, value in enumerate(plain):
            yield from find_masked_keys(value, f"{where}.{number}")


def _unexpand(plain: Any, raw: Any) -> Any:
    if isinstance(plain, dict) and isinstance(raw, Mapping):
        return {k: _unexpand(v, raw.get(k)) for k, v in plain.items()}
    if isinstance(plain, list) and isinstance(raw, list | tuple) and len(plain) == len(raw):
        return [_unexpand(p, r) for p, r in zip(plain, raw, strict=True)]
    return raw if isinstance(raw, str) and "${" in raw else plain


def _safe_key(raw: object, key: SecretStr) -> str:
    if isinstance(raw, str) and _VARIABLES_ONLY.fullmatch(raw):
        return raw
    return "EMPTY" if key.get_secret_value() == "EMPTY" else MASKED
