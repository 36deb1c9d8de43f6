"""The append-only journal: one JSON line per finished item, one file per life of the run.

A line is handed to the operating system the moment its item ends, so that the end of the
process loses nothing; a background task flushes it to disk every ``fsync_s``, which bounds what
the end of the machine can cost. Each life of a run writes a file of its own, so a line can only
be torn at the end of a file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import orjson

from ..contract.errors import LedgerError
from ..contract.types import Json

VERSION: Final = 1


class JournalWriter:
    """Writes one journal file, inside a running event loop.

    Args:
        path: The file to create; it must not exist.
        header: What the first line says besides the version.
        fsync_s: Seconds between flushes to disk.

    Raises:
        LedgerError: The file cannot be created or written.
    """

    def __init__(self, path: Path, header: dict[str, Json], fsync_s: float) -> None:
        self._path = path
        self._fsync_s = fsync_s
        self._written = self._flushed = 0
        self._failure: LedgerError | None = None
        try:
            self._file = FileIO(path, "xb")
        except OSError as error:
            raise LedgerError(f"{path}: cannot be created: {error.strerror}") from error
        self.write({"v": VERSION, **header})
        self._ticker = asyncio.create_task(self._tick(), name=f"fsync {path.name}")

    @property
    def written(self) -> int:
        """Return the bytes handed to the operating system."""
        return self._written

    def write(self, record: dict[str, Json]) -> tuple[int, int]:
        """Append one record, unbuffered.

        Returns:
            Where its line starts, and how long it is, in bytes.

        Raises:
            LedgerError: The line could not be written, or an earlier flush failed.
        """
        if self._failure is not None:
            raise self._failure
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        start = self._written
        try:
            done = self._file.write(line)
        except OSError as error:
            raise self._fail("cannot be written", error) from error
        if done != len(line):
            raise self._fail(f"took {done} of {len(line)} bytes (is the disk full?)")
        self._written += len(line)
        return start, len(line)

    async def flush(self) -> None:
        """Force everything written so far to disk.

        Raises:
            LedgerError: The disk refused.
        """
        goal = self._written
        if goal == self._flushed:
            return
        try:
            await asyncio.to_thread(os.fsync, self._file.fileno())
        except OSError as error:
            raise self._fail("cannot be flushed to disk", error) from error
        self._flushed = goal

    async def close(self) -> None:
        """Flush and close the file.

        Raises:
            LedgerError: The last flush failed.
        """
        self._ticker.cancel()
        with suppress(asyncio.CancelledError):
            await self._ticker
        try:
            await self.flush()
        finally:
            self._file.close()

    async def _tick(self) -> None:
        while self._failure is None:
            await asyncio.sleep(self._fsync_s)
            with suppress(LedgerError):  # kept in _failure; the next write and close raise it
                await self.flush()

    def _fail(self, what: str, error: OSError | None = None) -> LedgerError:
        reason = f": {error.strerror}" if error is not None else ""
        self._failure = LedgerError(f"{self._path}: the journal {what}{reason}")
        return self._failure


@dataclass(frozen=True, slots=True)
class Line:
    """One record as it stands in a journal file: its start and length in bytes."""

    start: int
    length: int
    record: dict[str, Any]


def scan(path: Path, run: str) -> Iterator[Line]:
    """Yield the records of one journal file; a torn last line is left out.

    Args:
        path: The file.
        run: The run's id, which the file's first line must carry.

    Raises:
        LedgerError: Anything else that is odd, with file and line.
    """
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # torn by the end of the process or of the machine
                record = _parse(line, path, number)
                if number == 1:
                    _check_header(record, path, run)
                else:
                    yield Line(start, len(line), record)
                start += len(line)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        msg = f"{path}, line {number}: not valid JSON ({error}); the file was damaged or edited"
        raise LedgerError(msg) from None
    if not isinstance(record, dict):
        raise LedgerError(f"{path}, line {number}: not a journal record")
    return record


def _check_header(record: dict[str, Any], path: Path, run: str) -> None:
    if record.get("v") != VERSION:
        msg = f"{path}, line 1: journal version {record.get('v')!r}, this fanfold reads {VERSION}"
        raise LedgerError(msg)
    if record.get("run") != run:
        msg = f"{path}, line 1: belongs to run {record.get('run')!r}, not to {run!r}"
        raise LedgerError(msg)
