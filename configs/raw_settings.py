"""Raw settings: presets and YAML files, overrides and variables, before they are checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from ..backends.core.errors import ConfigurationError
from ..backends.core.secrets import is_secret, mask_command
from .preset_files import is_preset, preset_names, read_preset

_VARIABLE: Final = re.compile(r"\$(\$?)\{([A-Za-z_][A-Za-z0-9_]*)\}")


def check_overrides(given: object) -> list[str]:
    """Return overrides as a list of ``a.b=value`` assignments.

    Raises:
        ConfigurationError: They are one text, a mapping, or a list of other values.
    """
    if isinstance(given, list | tuple) and all(isinstance(one, str) for one in given):
        return list(given)
    kinds = {str: "one text", dict: "a mapping", type(None): "null"}
    found = kinds.get(type(given), "a list of other values" if isinstance(given, list) else "")
    msg = (
        "overrides: give a list of texts, KEY=VALUE each, as in ['limits.streams=64', "
        f"'model.seed=null'] (found {found or type(given).__name__})"
    )
    raise ConfigurationError(msg)


def apply_override(data: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=value`` to ``data`` in place; the value is read as YAML.

    Raises:
        ConfigurationError: There is no ``=``, or a part of the path has no keys.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not all(name.strip() for name in path.split(".")):
        msg = f"--set {path}: expected KEY=VALUE, e.g. --set limits.streams=64"
        raise ConfigurationError(msg)
    from .yaml_text import parse_value  # noqa: PLC0415 - workers read no YAML

    shown = "" if is_secret(path) else f" {mask_command(text)!r}"
    set_path(data, path.strip(), parse_value(text, f"--set {path}", shown))


def set_path(data: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted key in place; a number names an element of a list.

    Raises:
        ConfigurationError: A part of the path has no keys.
    """
    *parents, last = path.split(".")
    node: Any = data
    for name in parents:
        node = _child(node, name, path)
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigurationError(_no_keys(path))


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, path)]
    if not isinstance(node, dict):
        raise ConfigurationError(_no_keys(path))
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: Sequence[Any], name: str, path: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        msg = f"--set {path}: {name!r} is not a position in that list (it has {len(node)})"
        raise ConfigurationError(msg)
    return int(name)


def _no_keys(path: str) -> str:
    return f"--set {path}: a part of this path is a plain value, which has no keys"


def expand_variables(data: Any, environment: Mapping[str, str], source: str, key: str = "") -> Any:
    """Return a copy with ``${VAR}`` replaced in string values; ``$${VAR}`` stays ``${VAR}``.

    Raises:
        ConfigurationError: A variable is not set; names file, key and variable.
    """
    if isinstance(data, dict):
        return {
            k: expand_variables(v, environment, source, join_path(key, str(k)))
            for k, v in data.items()
        }
    if isinstance(data, list | tuple):
        return [
            expand_variables(v, environment, source, join_path(key, str(n)))
            for n, v in enumerate(data)
        ]
    if not isinstance(data, str):
        return data

    def value(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        if escaped:
            return match.group(0)[1:]
        if name not in environment:
            msg = (
                f"{source}: {key}: the environment variable {name} is not set; "
                f"export {name}=… (or write $${{{name}}} for the literal text)"
            )
            raise ConfigurationError(msg)
        return environment[name]

    return _VARIABLE.sub(value, data)


def escape_variables(value: Any) -> Any:
    """Return a value whose texts do not change when variables are expanded."""
    if isinstance(value, str):
        return REFERENCE_START.sub("$$", value)
    if isinstance(value, Mapping):
        return {key: escape_variables(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [escape_variables(part) for part in value]
    return value


REFERENCE_START: Final = re.compile(r"\$(?=\{[A-Za-z_][A-Za-z0-9_]*\})")


def join_path(prefix: str, key: str) -> str:
    """Return the dotted path of a key below ``prefix``."""
    return f"{prefix}.{key}" if prefix else key


def get_at_path(data: Any, path: Sequence[str | int]) -> Any:
    """Return the value at a path, or None."""
    for name in path:
        try:
            data = data[name]
        except (KeyError, IndexError, TypeError):
            return None
    return data


@dataclass(frozen=True, slots=True)
class RawSettings:
    """Settings as they were read, not yet checked.

    Attributes:
        data: The settings with the overrides applied, unexpanded.
        source: Their name in messages: a path, ``preset NAME`` or ``settings``.
        folder: Folder in which relative paths start.
        preset: The preset's name if it is one.
    """

    data: dict[str, Any] = field(repr=False)
    source: str
    folder: Path
    preset: str | None = None


def read_settings(config: str | Path | Mapping[str, Any]) -> RawSettings:
    """Read settings without checking them.

    Args:
        config: A preset's name, a YAML file, or the settings themselves.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    raw = _read_config(config)
    expand_auto(raw.data)
    return raw


def expand_auto(data: dict[str, Any]) -> None:
    """Replace ``endpoints: auto`` by a section, to which keys can be added."""
    if data.get("endpoints") == "auto":
        data["endpoints"] = {"auto": True}


def _read_config(config: str | Path | Mapping[str, Any]) -> RawSettings:
    if isinstance(config, Mapping):
        return RawSettings(copy.deepcopy(dict(config)), "settings", Path.cwd())
    from .yaml_text import parse_yaml  # noqa: PLC0415 - workers read no YAML

    if isinstance(config, str) and is_preset(config):
        source = f"preset {config}"
        return RawSettings(parse_yaml(read_preset(config), source), source, Path.cwd(), config)
    path, source = Path(config), str(config)
    return RawSettings(parse_yaml(read_settings_file(path), source), source, path.resolve().parent)


def read_settings_file(path: Path) -> str:
    """Read a settings file.

    Raises:
        ConfigurationError: It is missing, unreadable or not UTF-8; names the file and a solution.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        close = get_close_matches(str(path), preset_names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see 'fanfold presets list'"
        msg = f"{path}: no such file, and no preset of that name; {hint}"
        raise ConfigurationError(msg) from None
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ConfigurationError(msg) from None
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ConfigurationError(msg) from None
    except ValueError:  # pathlib on a NUL character
        raise ConfigurationError(f"{str(path)!r} is no path") from None
