"""The append-only journal: one JSON line per finished item, one file per life of the run.

A line is handed to the operating system the moment its item ends, so that the end of the
process loses nothing; rounds of ``fsync``, one per ``fsync_s`` while there is something to
flush, bound what the end of the machine can cost. Each life of a run writes a file of its own,
so a line can only be torn at the end of a file.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import orjson

from ..contract.errors import LedgerError
from ..contract.types import Json

VERSION: Final = 1

RunIds: TypeAlias = str | tuple[str, ...]
"""A run's id; of a run whose folder was copied, the present id and then the earlier ones."""

_NO_FOLDER_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
"""What file systems say that flush folders by themselves, or not at all."""


class JournalWriter:
    """Writes one journal file, inside a running event loop.

    After a failure it writes nothing more.

    Args:
        path: The file to create; it must not exist.
        header: What the first line says besides the version.
        fsync_s: Seconds between flushes to disk.

    Attributes:
        at_risk: Records that a failed flush may have lost; else 0.

    Raises:
        LedgerError: The file cannot be created or written.
    """

    def __init__(self, path: Path, header: dict[str, Json], fsync_s: float) -> None:
        self._path = path
        self._fsync_s = fsync_s
        self._written = self._flushed = 0
        self._records = self._flushed_records = self.at_risk = 0
        self._failure: LedgerError | None = None
        self._round: asyncio.Task[None] | None = None
        self._hurry, self._closing = asyncio.Event(), False
        try:
            self._file = FileIO(path, "xb")
        except OSError as error:
            raise LedgerError(f"{path}: cannot be created: {error.strerror}") from error
        self._thread = ThreadPoolExecutor(1, f"fsync {path.name}")
        try:
            self._append(orjson.dumps({"v": VERSION, **header}, option=orjson.OPT_APPEND_NEWLINE))
        except LedgerError:
            self._file.close()
            raise

    @property
    def failed(self) -> bool:
        """Say whether a write or a flush failed."""
        return self._failure is not None

    def write(self, record: dict[str, Json]) -> tuple[int, int]:
        """Append one record, unbuffered.

        Returns:
            Where its line starts, and how long it is, in bytes.

        Raises:
            LedgerError: The line could not be written, or an earlier write or flush failed.
        """
        if self._failure is not None:
            raise self._failure
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        start = self._written
        self._append(line)
        self._records += 1
        return start, len(line)

    async def flush(self, *, at_once: bool = False) -> None:
        """Wait until everything written so far is on disk, by the next common flush.

        Args:
            at_once: Bring the next flush forward: nothing more is written meanwhile.

        Raises:
            LedgerError: The disk refused.
        """
        goal = self._written
        if at_once and self._flushed < goal:
            self._hurry.set()
        while self._flushed < goal and self._failure is None and self._round is not None:
            await asyncio.wait({self._round})
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Flush and close the file.

        Raises:
            LedgerError: A write or a flush failed, now or before.
        """
        self._closing = True
        self._hurry.set()
        try:
            while self._round is not None:
                await asyncio.wait({self._round})
            if self._flushed < self._written:  # after a failed write: what was written before it
                await self._sync()
        finally:
            self._file.close()
            self._thread.shutdown(wait=False)
        if self._failure is not None:
            raise self._failure

    def _append(self, line: bytes) -> None:
        done = 0
        while done < len(line):
            try:
                count = self._file.write(line[done:])
            except OSError as error:
                raise self._fail("cannot be written", error) from error
            done += count
        self._written += len(line)
        if self._round is None:
            self._round = asyncio.create_task(self._rounds(), name=f"fsync {self._path.name}")

    async def _rounds(self) -> None:
        """Flush after a pause, and again while something was written meanwhile."""
        try:
            if not self._flushed:
                await self._fsync(self._sync_folder)
            while self._flushed < self._written and self._failure is None:
                await _pause(self._hurry, self._fsync_s)
                if not self._closing:
                    self._hurry.clear()
                await self._sync()
        finally:
            self._round = None

    async def _sync(self) -> None:
        goal, records = self._written, self._records
        if await self._fsync(lambda: os.fsync(self._file.fileno())):
            self._flushed, self._flushed_records = goal, records

    async def _fsync(self, sync: Callable[[], None]) -> bool:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, sync)
        except OSError as error:
            self._fail("cannot be flushed to disk", error)
            self.at_risk = self._records - self._flushed_records
            return False
        return True

    def _sync_folder(self) -> None:
        """Make the file's name as durable as its content."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(folder)

    def _fail(self, what: str, error: OSError) -> LedgerError:
        self._failure = self._failure or LedgerError(
            f"{self._path}: the journal {what}: {error.strerror}"
        )
        return self._failure


async def _pause(hurry: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await hurry.wait()
    except TimeoutError:
        return


class Line(NamedTuple):
    """One record as it stands in a journal file: line number, start and length in bytes."""

    number: int
    start: int
    length: int
    record: dict[str, Any]


def scan(
    path: Path, run: RunIds, start: int = 0, first: int = 1, *, live: bool = False
) -> Iterator[Line]:
    """Yield the records of one journal file; a torn last line is left out.

    Args:
        path: The file.
        run: The run's ids, one of which the file's first line must carry.
        start: Where to begin, in bytes.
        first: Number of the line there.
        live: Whether it is still written to: then the first line with NUL bytes ends it for now.
            Network file systems show zeros where what another node wrote has not arrived.

    Raises:
        LedgerError: Anything else that is odd, with file and line.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            for number, line in enumerate(file, first):
                if live and b"\0" in line:
                    return
                if not line.endswith(b"\n"):
                    _check_torn(line, path, number, start)
                    return
                record = _parse(line, path, number)
                if number == 1:
                    _check_header(record, path, run)
                else:
                    yield Line(number, start, len(line), record)
                start += len(line)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error


def _check_torn(line: bytes, path: Path, number: int, start: int) -> None:
    """Accept a line that the end of the process cut; no process writes NUL bytes."""
    if b"\0" in line:
        msg = (
            f"{path}, line {number}: {line.count(0):,} NUL bytes, as the loss of a machine's power "
            f"leaves them; what stands before is whole: cut them off with "
            f"'truncate -s {start} {shlex.quote(str(path))}', then resume"
        )
        raise LedgerError(msg)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        msg = f"{path}, line {number}: not valid JSON ({error}); the file was damaged or edited"
        raise LedgerError(msg) from None
    if not isinstance(record, dict):
        raise LedgerError(f"{path}, line {number}: not a journal record")
    return record


def present_id(run: RunIds) -> str:
    """Return the id that a run has now."""
    return run if isinstance(run, str) else run[0]


def _check_header(record: dict[str, Any], path: Path, run: RunIds) -> None:
    if record.get("v") != VERSION:
        msg = f"{path}, line 1: journal version {record.get('v')!r}, this fanfold reads {VERSION}"
        raise LedgerError(msg)
    if record.get("run") not in ((run,) if isinstance(run, str) else run):
        found, own = record.get("run"), present_id(run)
        msg = f"{path}, line 1: belongs to run {found!r}, not to {own!r}"
        raise LedgerError(msg)
