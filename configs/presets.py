"""The presets that ship with fanfold: one ready configuration per use case."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from ..backends.core.errors import ConfigurationError

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
    """Say whether ``name`` is a preset rather than a path."""
    return name in preset_names()


def preset_text(name: str) -> str:
    """Return a preset's YAML.

    Raises:
        ConfigurationError: There is no such preset; lists those that there are.
    """
    names = preset_names()
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        msg = f"no preset {name!r} (there are {', '.join(names)}){hint}"
        raise ConfigurationError(msg)
    return (files("fanfold.configs") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def copy_preset(name: str, target: Path) -> None:
    """Write a preset to a file for editing, its ``endpoints`` left for the user to fill.

    Raises:
        ConfigurationError: No such preset, or the file exists or cannot be written.
    """
    text = _ENDPOINTS.sub(lambda _: _TO_FILL, preset_text(name), count=1)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        msg = f"{target}: exists already; choose another name"
        raise ConfigurationError(msg) from None
    except OSError as error:
        msg = f"{target}: cannot be written: {error.strerror}"
        raise ConfigurationError(msg) from None
