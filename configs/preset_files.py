"""The presets, and the JSON Schema of configurations, as they ship."""

from __future__ import annotations

import re
from contextlib import suppress
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Final

from ..backends.core.errors import ConfigurationError

SETTINGS_SCHEMA: Final = "fanfold.schema.json"
"""The file with the JSON Schema of configurations, which each preset names for editors."""

_ENDPOINTS = re.compile(r"^endpoints:.*(?:\n(?:[ \t].*)?)*\n?", re.MULTILINE)

_TO_FILL = """\
endpoints:
  urls: []            # fill in, e.g. [http://node17:8000/v1]; or file, hosts, first, … instead
  api_key: EMPTY      # or "${MY_KEY}", read from the environment

"""


def preset_names() -> list[str]:
    """Return the names of the presets."""
    folder = files("fanfold.configs") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def is_preset(name: str) -> bool:
    """Return True if ``name`` is a preset and not a path."""
    return name in preset_names()


def read_preset(name: str) -> str:
    """Return a preset's YAML.

    Raises:
        ConfigurationError: There is no such preset; lists the presets.
    """
    names = preset_names()
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        msg = f"no preset {name!r} (there are {', '.join(names)}){hint}"
        raise ConfigurationError(msg)
    return _read_shipped(f"{name}.yaml")


def read_settings_schema() -> str:
    """Return the JSON Schema of a configuration file."""
    return _read_shipped(SETTINGS_SCHEMA)


def _read_shipped(name: str) -> str:
    return (files("fanfold.configs") / "presets" / name).read_text(encoding="utf-8")


def copy_preset(name: str, target: Path) -> None:
    """Write a preset to a file for editing, with ``endpoints`` for the user to fill in.

    The schema that the preset names for editors is written beside it, unless it is there already.

    Raises:
        ConfigurationError: No such preset, or the file exists or cannot be written.
    """
    text = _ENDPOINTS.sub(lambda _: _TO_FILL, read_preset(name), count=1)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
        with suppress(FileExistsError), (target.parent / SETTINGS_SCHEMA).open("x") as file:
            file.write(read_settings_schema())
    except FileExistsError:
        msg = f"{target}: exists already; choose another name"
        raise ConfigurationError(msg) from None
    except OSError as error:
        msg = f"{target}: cannot be written: {error.strerror}"
        raise ConfigurationError(msg) from None
