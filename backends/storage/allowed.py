"""Caps that were allowed at a pause, kept beside the run's settings."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.errors import LedgerError
from ..core.types import Json
from .run_folder import write_json

_VERSION: Final = 2


def read_allowed(path: Path) -> dict[str, Json]:
    """Return the caps by their names in settings; none when nothing was allowed.

    Raises:
        LedgerError: The file is damaged.
    """
    return dict(_read(path)["caps"])


def read_requested(path: Path) -> set[str]:
    """Return the names of the caps that requests have set.

    Raises:
        LedgerError: The file is damaged.
    """
    return set(_read(path)["requested"])


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data: Any = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {"caps": {}, "requested": []}
    except (OSError, orjson.JSONDecodeError) as error:
        raise LedgerError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("v") != _VERSION:
        raise LedgerError(f"{path}: not a file of this version of fanfold; remove it, and resume")
    return dict(data)


def write_allowed(path: Path, caps: Mapping[str, Json], requested: Set[str] = frozenset()) -> None:
    """Write the caps, in one step.

    Args:
        path: The file.
        caps: The caps by their names in settings.
        requested: Those that requests have set; they are at most what their graph is bound to.

    Raises:
        LedgerError: The file cannot be written.
    """
    write_json(path, {"v": _VERSION, "caps": dict(caps), "requested": sorted(requested)})
