"""The ledger of a run: which items are finished, and how, over all of the run's lives."""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from ..contract.errors import LedgerError
from ..contract.types import Json
from .journal import JournalWriter, scan

_OPEN, _DONE, _FAILED = 0, 1, 2
_CODES: Final = {"done": _DONE, "failed": _FAILED}


@dataclass(frozen=True, slots=True)
class Counts:
    """How many items are done, failed, and still open."""

    done: int
    failed: int
    open: int


@dataclass(slots=True)
class Spent:
    """Requests and tokens over all records, those that a newer one replaced included."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Add what one record says; tokens that no server reported count as none."""
        self.requests += record.get("attempts") or 0
        self.prompt_tokens += record.get("prompt_tokens") or 0
        self.completion_tokens += record.get("completion_tokens") or 0


class Ledger:
    """Index over the journal files of one run; writable when opened for a new life.

    It holds 17 bytes per item: its state and where its record lies. The records themselves stay
    on disk. A later record of an item takes the place of an earlier one.

    Args:
        folder: The journal's folder.
        run: The run's id.
        items: Number of items of the run.

    Attributes:
        spent: Requests and tokens so far.

    Raises:
        LedgerError: A file is damaged or belongs to another run.
    """

    def __init__(self, folder: Path, run: str, items: int) -> None:
        self._folder, self._run = folder, run
        self._state = bytearray(items)
        self._file = array("i", bytes(4 * items))
        self._start = array("q", bytes(8 * items))
        self._length = array("i", bytes(4 * items))
        self._paths: list[Path] = sorted(folder.glob("*.jsonl"))
        self._handles: dict[int, int] = {}
        self._writer: JournalWriter | None = None
        self._life: tuple[str, float] | None = None
        self.spent = Spent()
        for number, path in enumerate(self._paths):
            for line in scan(path, run):
                self._note(number, line.start, line.length, self._checked(line.record, path))

    # -- writing -------------------------------------------------------------------------

    def begin(self, life: str, fsync_s: float) -> None:
        """Allow writing; the new journal file is made when the first item ends.

        Args:
            life: What the file's header says of the process that writes it.
            fsync_s: Seconds between flushes to disk.
        """
        self._life = (life, fsync_s)

    def put(self, record: dict[str, Json]) -> None:
        """Record how an item ended; on return it is safe from the end of this process.

        Needs a running event loop.

        Raises:
            LedgerError: It could not be written; says how many items are safe.
        """
        try:
            writer = self._writer or self._open_writer()
            start, length = writer.write(record)
        except LedgerError as error:
            safe = len(self._state) - self._state.count(_OPEN)
            msg = (
                f"{error.message}. {safe} of {len(self._state)} items are safe; "
                "make room or mend the permissions, then resume"
            )
            raise LedgerError(msg) from error
        self._note(len(self._paths) - 1, start, length, record)

    def _open_writer(self) -> JournalWriter:
        if self._life is None:
            raise LedgerError(f"{self._folder}: the ledger is open for reading only")
        life, fsync_s = self._life
        last = int(self._paths[-1].stem) if self._paths else 0
        path = self._folder / f"{last + 1:04}.jsonl"
        self._writer = JournalWriter(path, {"run": self._run, "life": life}, fsync_s)
        self._paths.append(path)
        return self._writer

    async def flush(self) -> None:
        """Force everything written so far to disk."""
        if self._writer is not None:
            await self._writer.flush()

    async def aclose(self) -> None:
        """Flush and close all files."""
        try:
            if self._writer is not None:
                await self._writer.close()
        finally:
            self._writer = None
            self.close()

    def close(self) -> None:
        """Close the files opened for reading."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __enter__(self) -> Self:
        """Use it for reading."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files opened for reading."""
        self.close()

    # -- reading -------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Count the items by state."""
        state = self._state
        return Counts(state.count(_DONE), state.count(_FAILED), state.count(_OPEN))

    def reopen_failed(self) -> int:
        """Treat failed items as open again; their records stay until newer ones come.

        Returns:
            How many they are.
        """
        failed = self._state.count(_FAILED)
        self._state = self._state.replace(bytes([_FAILED]), bytes([_OPEN]))
        return failed

    def finished(self, index: int) -> bool:
        """Say whether an item has ended."""
        return self._state[index] != _OPEN

    def record(self, index: int) -> dict[str, Any]:
        """Read back the record of a finished item.

        Raises:
            LedgerError: The journal changed under our feet.
        """
        path = self._paths[self._file[index]]
        try:
            line = self._read(index, path)
            record: dict[str, Any] = orjson.loads(line)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
        except orjson.JSONDecodeError:
            record = {}
        if record.get("index") != index:
            raise LedgerError(f"{path}: changed while the run was using it")
        return record

    def _read(self, index: int, path: Path) -> bytes:
        number = self._file[index]
        handle = self._handles.get(number)
        if handle is None:
            handle = self._handles[number] = os.open(path, os.O_RDONLY)
        return os.pread(handle, self._length[index], self._start[index])

    def records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records of finished items in input order, or those of one status."""
        wanted = _CODES[status] if status else None
        for index, state in enumerate(self._state):
            if state != _OPEN and wanted in (None, state):
                yield self.record(index)

    def _note(self, number: int, start: int, length: int, record: dict[str, Any]) -> None:
        index = record["index"]
        self.spent.add(record)
        self._state[index] = _CODES[record["status"]]
        self._file[index], self._start[index], self._length[index] = number, start, length

    def _checked(self, record: dict[str, Any], path: Path) -> dict[str, Any]:
        index = record.get("index")
        if not isinstance(index, int) or not 0 <= index < len(self._state):
            msg = f"{path}: record of item {record.get('id')!r} has no place in this run's input"
            raise LedgerError(msg)
        if record.get("status") not in _CODES:
            msg = f"{path}: record of item {record.get('id')!r}: unknown status"
            raise LedgerError(msg)
        return record


async def open_ledger(folder: Path, run: str, items: int) -> Ledger:
    """Read the journal files in a thread and return their ledger."""
    return await asyncio.to_thread(Ledger, folder, run, items)
