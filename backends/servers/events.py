"""Log the events of a node's servers, and report their last errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.errors import BackendError
from .plan import ServerFailure

logger: Final = logging.getLogger(__name__)

VERSION: Final = 1


class EventLog:
    """The event log of a node; a line is visible to other processes when the call returns.

    Args:
        path: The file.
        host: The node's name.

    Raises:
        BackendError: The file cannot be opened.
    """

    def __init__(self, path: Path, host: str) -> None:
        self._host = host
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise BackendError(f"{path}: cannot be written: {error.strerror}") from None

    def append(self, event: str, **what: Any) -> None:
        """Append one line; blocks for a short write.

        A full disk must not end servers: a line that cannot be written is logged as a warning.
        """
        line = {"v": VERSION, "at": round(time.time(), 3), "host": self._host, "event": event}
        try:
            self._file.write(orjson.dumps(line | what) + b"\n")
        except OSError as error:
            logger.warning("%s: %s is not recorded: %s", self._file.name, event, error.strerror)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an event log; partial lines and other versions are left out."""
    lines = list[dict[str, Any]]()
    for raw in path.read_bytes().splitlines():
        try:
            line = orjson.loads(raw)
        except orjson.JSONDecodeError:
            continue  # the node was lost during the write
        if isinstance(line, dict) and line.get("v") == VERSION:
            lines.append(line)
    return lines


def split_periods(lines: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the lines of each period in which the node was served."""
    periods = list[list[Mapping[str, Any]]]()
    for line in lines:
        if line["event"] == "begin":
            periods.append([line])
        elif periods:
            periods[-1].append(line)
    return periods


_NODES: Final = 3
_BYTES: Final = 8192
_LINES: Final = 20


def last_errors(servers: Path, log: Path) -> list[str]:
    """Return why no server was left: from the nodes, or else from the log of the process.

    Args:
        servers: The servers folder.
        log: The log of the processes that serve; blocks while it is read.
    """
    files = sorted((servers / "logs").glob("*.failed"))
    lines = [line for file in files[:_NODES] for line in _read_failure(file).splitlines()]
    if len(files) > _NODES:
        lines.append(f"… and {len(files) - _NODES:,} more nodes: {servers}/logs/*.failed")
    return lines or [f"from {log}:", *_text(log)[-_BYTES:].splitlines()[-_LINES:]]


def _read_failure(file: Path) -> str:
    try:
        return ServerFailure.read(file).text
    except OSError as error:
        return f"({file} cannot be read: {error.strerror})"
    except ValueError:
        return f"({file} is damaged)"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"({file} cannot be read: {error.strerror})"
