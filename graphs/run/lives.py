"""What a run's provenance says of the processes that worked on it."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from ...backends.core.secrets import mask_arguments
from ...backends.storage.run_folder import RunFolder, now
from .identity import settle_identity

_BLANK: Final = re.compile(r"\s")
DIR: Final = Path("DIR")
"""What stands for the run's folder in a command that is kept."""
_PACKAGES: Final = ("fanfold", "langgraph", "langchain-core", "langchain-openai", "pydantic")


def begin_life(folder: RunFolder) -> None:
    """Note that this process begins to work on a run that it has locked; blocks."""
    about = settle_identity(folder)
    folder.write_provenance(about | {"lives": [*about["lives"], life(folder)]})


def end_life(folder: RunFolder) -> None:
    """Note that the run is finished, in the life that has begun; blocks.

    A graph that goes on from a checkpoint has not begun one: then it is noted whole.
    """
    about = folder.read_provenance()
    lives = about["lives"]
    begun = bool(lives) and lives[-1]["ended"] is None and lives[-1]["pid"] == os.getpid()
    *before, last = lives if begun else [*lives, life(folder)]
    last |= {"ended": now(), "outcome": "finished"}
    folder.write_provenance(about | {"lives": [*before, last]})


def life(folder: RunFolder) -> dict[str, Any]:
    """Return what provenance keeps of this process.

    Args:
        folder: The run's folder, which stands in the command as ``DIR``.
    """
    return {
        "started": now(),
        "ended": None,
        "outcome": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in _PACKAGES},
        "command": [Path(sys.argv[0]).name, *mask_arguments(_without(sys.argv[1:], folder.path))],
        "git": {"fanfold": _own_commit(), "workdir": _commit(Path.cwd())},
    }


def _without(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield the command's arguments, the folder and what lies in it without the folder's path."""
    own = folder.resolve()
    for argument in arguments:
        *key, text = argument.rsplit("=", 1)  # --out=DIR, --set cache=DIR/answers
        if "://" not in text and _may_be_path(text):
            place = Path(text).expanduser().resolve()
            text = str(DIR / place.relative_to(own)) if place.is_relative_to(own) else text
        for spelling in {str(own), str(folder.absolute())}:
            text = re.sub(rf"{re.escape(spelling)}(?![\w.-])", str(DIR), text)
        yield "=".join((*key, text))


def _may_be_path(text: str) -> bool:
    try:
        return ("/" in text and not _BLANK.search(text)) or (text != "" and Path(text).exists())
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def _commit(folder: Path) -> str | None:
    """Return the commit that a folder is at, with ``+`` when files differ; None outside git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git: provenance says so by None
    return found.stdout.strip() or None


def _own_commit() -> str | None:
    """Return fanfold's own commit; None for an installed wheel, even below somebody's checkout."""
    root = Path(__file__).resolve().parent.parent
    return _commit(root) if (root / ".git").exists() else None
