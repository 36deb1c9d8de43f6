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

from ..backends.accounts.folder import RunFolder, now
from ..configs.source import may_be_secret

_HIDDEN: Final = re.compile(r"://\S*@")
_INNER_SECRET: Final = re.compile(r"(?:key|token)\w*[\"']?\s*:")
_PACKAGES: Final = ("fanfold", "langgraph", "langchain-core", "langchain-openai", "pydantic")


def begin_life(folder: RunFolder) -> None:
    """Note that this process begins to work on a run that it has locked; blocks."""
    about = folder.read_provenance()
    folder.write_provenance(about | {"lives": [*about["lives"], life()]})


def end_life(folder: RunFolder) -> None:
    """Note that the run is finished, in the life that has begun; blocks.

    A graph that goes on from a checkpoint has not begun one: then it is noted whole.
    """
    about = folder.read_provenance()
    lives = about["lives"]
    begun = bool(lives) and lives[-1]["ended"] is None and lives[-1]["pid"] == os.getpid()
    *before, last = lives if begun else [*lives, life()]
    last |= {"ended": now(), "outcome": "finished"}
    folder.write_provenance(about | {"lives": [*before, last]})


def life() -> dict[str, Any]:
    """Return what provenance keeps of this process."""
    return {
        "started": now(),
        "ended": None,
        "outcome": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in _PACKAGES},
        "command": [Path(sys.argv[0]).name, *_public(sys.argv[1:])],
        "git": {"fanfold": _own_commit(), "workdir": _commit(Path.cwd())},
    }


def _public(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the command's arguments; what may hold a secret only as far as it is none."""
    for argument in arguments:
        if "://" in argument:
            yield _HIDDEN.sub("://…@", argument.partition("?")[0])
        elif may_be_secret(argument.partition("=")[0].rpartition(".")[2]):
            yield argument.partition("=")[0] + ("=…" if "=" in argument else "")
        elif _INNER_SECRET.search(argument):
            yield argument.partition("=")[0] + "=…"
        else:
            yield argument


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
