"""Which task of the service works on which shard, on disk before anybody waits for it.

One line of JSON per event, appended and flushed; a line that a crash has torn is the last one and
is left out. A coordinator that follows one that was killed reads here what to ask after.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import orjson

from ...contract.errors import LedgerError

FILE: Final = "globus.jsonl"
"""Its name in the run folder."""

_TAIL: Final = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """One task.

    Attributes:
        shard: The shard's name.
        task: The task's id.
        group: Id of the task's group.
        endpoint: Id of the endpoint that it was posted to.
        until: When it counts as lost, seconds since the epoch.
    """

    shard: str
    task: str
    group: str
    endpoint: str
    until: float


class TaskBook:
    """A run's tasks; its calls block.

    Args:
        path: Its file; need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def open_entries(self) -> list[Entry]:
        """Return the tasks that were posted and not closed, by whichever coordinator.

        Raises:
            LedgerError: The file is damaged.
        """
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(f"{self._path}: cannot be read: {error.strerror}") from error
        entries = dict[str, Entry]()
        for number, line in enumerate(lines[:-1], 1):  # the rest was torn, or is nothing
            event = self._event(line, number)
            if isinstance(event, Entry):
                entries[event.task] = event
            else:
                for task in event:
                    entries.pop(task, None)
        return list(entries.values())

    def _event(self, line: bytes, number: int) -> Entry | list[str]:
        try:
            data: dict[str, Any] = orjson.loads(line)
            if "closed" in data:
                return list(data["closed"])
            return Entry(**{field.name: data[field.name] for field in fields(Entry)})
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            msg = (
                f"{self._path}, line {number}: damaged ({error}); remove the file to give up what "
                "still runs, then resume"
            )
            raise LedgerError(msg) from error

    def write(self, closed: list[str], posted: Iterable[Entry]) -> None:
        """Write down which tasks nobody need ask after any more, and which are new.

        On return it is on disk.

        Raises:
            LedgerError: It could not be written.
        """
        events: list[dict[str, Any]] = [{"closed": closed}] if closed else []
        events += [asdict(entry) for entry in posted]
        if events:
            self._append(b"".join(orjson.dumps(event) + b"\n" for event in events))

    def _append(self, data: bytes) -> None:
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _mend(handle)
                written = os.write(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise LedgerError(f"{self._path}: cannot be written: {error.strerror}") from error
        if written < len(data):
            raise LedgerError(f"{self._path}: cannot be written: the disk is full")


def _mend(handle: int) -> None:
    """Cut off a line that a crash has torn."""
    size = os.fstat(handle).st_size
    tail = os.pread(handle, _TAIL, max(0, size - _TAIL))
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(handle, size - len(tail) + tail.rfind(b"\n") + 1)
