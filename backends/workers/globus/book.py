"""Which task of the service works on which shard, on disk before anybody waits for it.

One line of JSON per event with a checksum, appended and flushed; a line that a crash has torn is
the last one and is left out. A coordinator that follows one that was killed reads here what to ask
after.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import orjson

from ...core.checksum import BEFORE, add_crc, check_crc, crc_before
from ...core.disk import sync_folder
from ...core.errors import LedgerError

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
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(f"{self._path}: cannot be read: {error.strerror}") from error
        entries, crc = dict[str, Entry](), 0
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]  # it was torn
        for number, line in enumerate(lines, 1):
            found = check_crc(line, crc)
            if found is None:
                raise self._damaged(number, "the checksum does not match")
            event, crc = self._event(line, number), found
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
            raise self._damaged(number, str(error)) from error

    def _damaged(self, number: int, what: str) -> LedgerError:
        return LedgerError(
            f"{self._path}, line {number}: damaged ({what}); remove the file to give up what "
            "still runs, then resume"
        )

    def write(self, closed: list[str], posted: Iterable[Entry]) -> None:
        """Write down which tasks nobody need ask after any more, and which are new.

        On return it is on disk.

        Raises:
            LedgerError: It could not be written.
        """
        events: list[dict[str, Any]] = [{"closed": closed}] if closed else []
        events += [asdict(entry) for entry in posted]
        if events:
            self._append(events)

    def _append(self, events: Iterable[dict[str, Any]]) -> None:
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _mend(handle)
                data, is_new = _lines(events, _last_crc(handle)), os.fstat(handle).st_size == 0
                written = os.write(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            if is_new:
                sync_folder(self._path.parent)
        except OSError as error:
            raise LedgerError(f"{self._path}: cannot be written: {error.strerror}") from error
        except ValueError:
            text = "its end is damaged; remove the file to give up what still runs, then resume"
            raise LedgerError(f"{self._path}: cannot be written: {text}") from None
        if written < len(data):
            raise LedgerError(f"{self._path}: cannot be written: the disk is full")


def _lines(events: Iterable[dict[str, Any]], crc: int) -> bytes:
    lines = list[bytes]()
    for event in events:
        line, crc = add_crc(orjson.dumps(event), crc)
        lines.append(line)
    return b"".join(lines)


def _last_crc(handle: int) -> int:
    """Return the checksum of the last line; 0 where there is none.

    Raises:
        ValueError: The file does not end in a line.
    """
    size = os.fstat(handle).st_size
    return crc_before(os.pread(handle, BEFORE, max(0, size - BEFORE))) if size else 0


def _mend(handle: int) -> None:
    """Cut off a line that a crash has torn, however long it is."""
    size, end = os.fstat(handle).st_size, os.fstat(handle).st_size
    while end:
        begin = max(0, end - _TAIL)
        at = os.pread(handle, end - begin, begin).rfind(b"\n")
        if at >= 0:
            end = begin + at + 1
            break
        end = begin
    if end < size:
        os.ftruncate(handle, end)
