"""Caps that were allowed at a pause, kept beside the run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from ..contract.errors import LedgerError
from ..contract.types import Json
from .folder import write_json

_VERSION: Final = 1


def read_allowed(path: Path) -> dict[str, Json]:
    """Return the caps by their names in settings; none when nothing was allowed.

    Raises:
        LedgerError: The file is damaged.
    """
    try:
        data: Any = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        raise LedgerError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("v") != _VERSION:
        raise LedgerError(f"{path}: not a file of this version of fanfold; remove it, and resume")
    return dict(data["caps"])


def write_allowed(path: Path, caps: Mapping[str, Json]) -> None:
    """Write the caps, in one step.

    Raises:
        LedgerError: The file cannot be written.
    """
    write_json(path, {"v": _VERSION, "caps": dict(caps)})
