"""From settings to a run folder: everything is checked before anything is written or called."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from ..backends.accounts.folder import RunFolder, is_vacant, new_folder, now, write_bytes
from ..backends.build import input_spec, needed_columns, serving
from ..backends.contract.errors import ConfigurationError
from ..backends.inputs.spec import InputSummary
from ..backends.inputs.spill import spill
from ..configs.load import Loaded, to_yaml
from .identity import fingerprint

RUNS: Final = "fanfold-runs"
_PACKAGES: Final = ("fanfold", "langgraph", "langchain-core", "langchain-openai", "pydantic")


def default_folder(name: str) -> Path:
    """Return a folder for a new run below the working directory."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path.cwd() / RUNS / f"{name}-{stamp}-{secrets.token_hex(2)}"


async def prepare_run(
    loaded: Loaded, path: Path, items: Sequence[Mapping[str, Any]] | None = None
) -> RunFolder:
    """Check input and endpoints, and make the run's folder.

    Args:
        loaded: The settings.
        path: The folder to make.
        items: Items in place of the configured input.

    Raises:
        ConfigurationError: Something does not fit; then there is no folder.
    """
    if not await asyncio.to_thread(is_vacant, path):
        msg = f"{path}: holds something else already; choose another --out"
        raise ConfigurationError(msg)
    _check_input(loaded, items)
    model, simulated = await _settle_model(loaded)
    await asyncio.to_thread(_make, loaded, path, items, model, simulated)
    return RunFolder(path)


def _check_input(loaded: Loaded, items: Sequence[Mapping[str, Any]] | None) -> None:
    given = loaded.config.input
    if items is None and given.path is None and given.dataset is None:
        msg = f"{loaded.source}: the key 'input.path' (or 'input.dataset') is missing"
        raise ConfigurationError(msg)


async def _settle_model(loaded: Loaded) -> tuple[str, bool]:
    """Return the model's name, and whether the endpoints are simulated."""
    async with serving(loaded.config, loaded.plain["endpoints"]) as up:
        return up.model, up.simulated


def _make(
    loaded: Loaded,
    path: Path,
    items: Sequence[Mapping[str, Any]] | None,
    model: str,
    simulated: bool,
) -> None:
    with new_folder(path) as folder:
        spec = input_spec(loaded.config, items)
        summary = spill(spec, folder.items, needed_columns(loaded.config))
        write_bytes(folder.settings, to_yaml(loaded.plain).encode())
        folder.write_provenance(
            {
                "run": secrets.token_hex(8),
                "name": loaded.config.name,
                "config": loaded.source,
                "simulated": simulated,
                "model": model,
                "fingerprint": fingerprint(loaded.config, model, simulated),
                "input": describe_input(summary, spec.path),
                "lives": [],
            }
        )


def describe_input(summary: InputSummary, path: Path | None) -> dict[str, Any]:
    """Return what provenance keeps of the input."""
    return {
        "source": summary.source,
        "items": summary.items,
        "digest": summary.digest,
        "stamp": stamp(path),
        "invalid": summary.invalid,
        "skipped_total": summary.skipped_total,
        "skipped": [{"id": s.id, "reason": s.reason} for s in summary.skipped],
    }


def stamp(path: Path | None) -> list[int] | None:
    """Return size and modification time (ns) of an input file, to see whether it changed."""
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


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
        "git": {"fanfold": _commit(Path(__file__).parent), "workdir": _commit(Path.cwd())},
    }


def _public(arguments: Sequence[str]) -> list[str]:
    """Return the command's arguments without values that may be secret."""
    return [a.partition("=")[0] + "=…" if "api_key" in a or "@" in a else a for a in arguments]


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
