"""The writer of a journal file, inside an event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import orjson

from ..core.checksum import add_crc
from ..core.disk import sync_folder
from ..core.errors import JournalError
from ..core.types import Json
from .journal_file import make_header


class JournalWriter:
    """Write one journal file inside a running event loop.

    After a failure nothing more is written.

    Args:
        path: The file to create; it must not exist.
        header: Content of the first line besides the version.
        fsync_s: Seconds between flushes to disk.

    Attributes:
        at_risk: Records that a failed flush may have lost; otherwise 0.

    Raises:
        JournalError: The file cannot be created or written.
    """

    def __init__(self, path: Path, header: dict[str, Json], fsync_s: float) -> None:
        self._path = path
        self._fsync_s = fsync_s
        self._written = self._flushed = self._crc = 0
        self._records = self._flushed_records = self.at_risk = 0
        self._failure: JournalError | None = None
        self._round: asyncio.Task[None] | None = None
        self._hurry, self._closing = asyncio.Event(), False
        try:
            self._file = FileIO(path, "xb")
        except OSError as error:
            raise JournalError(f"{path}: cannot be created: {error.strerror}") from error
        self._thread = ThreadPoolExecutor(1, f"fsync {path.name}")
        try:
            line, self._crc = add_crc(make_header(path, "journal", header), 0)
            self._append(line)
        except JournalError:
            self._file.close()
            raise

    @property
    def failed(self) -> bool:
        """Return True if a write or a flush failed."""
        return self._failure is not None

    @property
    def position(self) -> tuple[int, int, int]:
        """Return the file's size, the number of the next line, and the checksum of the last."""
        return self._written, self._records + 2, self._crc

    def write(self, record: dict[str, Json]) -> tuple[int, int]:
        """Append one record, unbuffered.

        Returns:
            Start and length of the line in bytes.

        Raises:
            TypeError: A value has no JSON form; nothing was written.
            JournalError: The line could not be written, or an earlier write or flush failed.
        """
        if self._failure is not None:
            raise self._failure
        line, self._crc = add_crc(orjson.dumps(record), self._crc)
        start = self._written
        self._append(line)
        self._records += 1
        return start, len(line)

    async def flush(self, *, at_once: bool = False) -> None:
        """Wait until everything written so far is on disk, by the next common flush.

        Args:
            at_once: Flush without waiting for the interval; nothing more is written meanwhile.

        Raises:
            JournalError: The flush failed.
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
            JournalError: A write or a flush failed, now or earlier.
        """
        self._closing = True
        self._hurry.set()
        try:
            while self._round is not None:
                await asyncio.wait({self._round})
            if self._flushed < self._written:  # after a failed write: flush what came before it
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
        """Flush after a pause; repeat while more was written meanwhile."""
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
        sync_folder(self._path.parent)

    def _fail(self, what: str, error: OSError) -> JournalError:
        self._failure = self._failure or JournalError(
            f"{self._path}: the journal {what}: {error.strerror}"
        )
        return self._failure


async def _pause(wake: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return
