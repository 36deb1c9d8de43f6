"""Journal: index over all journal files of a run (17 bytes per item)."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from itertools import compress, islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from ..core.checksum import PREVIOUS_CRC_BYTES, check_crc, parse_crc
from ..core.errors import JournalError
from ..core.types import Json
from .journal import (
    ItemCounts,
    JournalDelta,
    JournalSource,
    JournalWriter,
    RecordKey,
    RunIds,
    UsageTotals,
    check_line,
    check_renamed_files,
    get_current_run_id,
    index_line,
    make_record_key,
    make_worker_prefix,
    parse_session_number,
    scan_lines,
    sum_records,
)

_MAX_OPEN_FILES: Final = 128
"""Files kept open: processes are set up for few, and connections need most of them."""


class _Handle:
    """An open file; it is closed when neither those kept nor a reader refers to it any more."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class FileHandles:
    """Keeps open the files that were read last; threads may read at the same time.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int = _MAX_OPEN_FILES) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept = dict[Path, _Handle]()  # the one read last comes last

    def __len__(self) -> int:
        """Return how many are open."""
        return len(self._kept)

    def read(self, path: Path, start: int, length: int) -> bytes:
        """Return a part of a file.

        Raises:
            OSError: It cannot be opened or read.
        """
        with self._lock:
            handle = self._kept.pop(path, None) or _Handle(os.open(path, os.O_RDONLY))
            self._kept[path] = handle
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return os.pread(handle.number, length, start)

    def close(self) -> None:
        """Close all; whoever reads just now still ends."""
        with self._lock:
            self._kept.clear()


_OPEN, _DONE, _FAILED = 0, 1, 2
_CODES: Final = {"done": _DONE, "failed": _FAILED}

_BATCH_LINES: Final = 256
"""Lines that are checked and added up together."""


@dataclass(slots=True)
class _FollowedFile:
    """A worker's file: its number, and where to read on."""

    number: int
    start: int = 0
    line: int = 1
    crc: int = 0


class Journal:
    """Index over the journal files of one run; writable when opened for a new life.

    It holds 17 bytes per item: its state and where its record lies. The records themselves stay
    on disk. Threads may read at the same time; one event loop writes.

    Workers of a session write files of their own beside the coordinator's
    (``0002-node17-4242.jsonl`` beside ``0002.jsonl``); :meth:`refresh` reads on in them. Of several
    records of an item that of the later session counts; within a session an answer counts before a
    failure, and else the record that was finished first. This does not depend on the order in
    which they are read.

    Args:
        folder: The journal's folder.
        run: The run's ids; new files carry the present one.
        items: Number of items of the run.
        extents: What :meth:`extents` returned when the run's aggregate was made: later records of
            the sessions up to then are not read, so that records and aggregate agree.

    Attributes:
        usage_by_session: What each session has spent, by its number; records that do not count are
            included.
        duplicates: Records that took the place of another one, or of the same session as the one
            that
            count_items: what was folded of their items may differ from what the ledger keeps.

    Raises:
        JournalError: A file is damaged or belongs to another run.
    """

    def __init__(
        self,
        folder: Path,
        run: RunIds,
        items: int,
        extents: Mapping[str, int] | None = None,
    ) -> None:
        self._folder, self._run = folder, run
        self._state = bytearray(items)
        self._file = array("i", bytes(4 * items))
        self._start = array("q", bytes(8 * items))
        self._length = array("i", bytes(4 * items))
        self._paths = sorted(
            folder.glob("*.jsonl"), key=lambda path: (parse_session_number(path), path.stem)
        )
        self._followed: dict[Path, _FollowedFile] = {}
        self._handles = FileHandles()
        self._writer: JournalWriter | None = None
        self._own = -1
        self._session: tuple[str, float] | None = None
        self.session_number = 0
        self.duplicates = 0
        self._failure: JournalError | None = None
        self.usage_by_session: dict[int, UsageTotals] = {}
        self._sums: list[UsageTotals] = []
        self._ends: list[int] = []
        self._check_names()
        for number, path in enumerate(self._paths):
            at = _FollowedFile(number)
            self._read_on(path, at, end=_end_in(extents, path))
            if "-" in path.stem:
                self._followed[path] = at  # its worker may outlive the coordinator

    def _check_names(self) -> None:
        try:
            check_renamed_files(self._folder, self._run)
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot be listed: {error.strerror}") from error

    # -- writing -------------------------------------------------------------------------

    def start_session(self, session: str, fsync_s: float, least: int = 1) -> None:
        """Allow writing; the new journal file is made when the first item ends.

        Args:
            session: What the file's header says of the process that writes it.
            fsync_s: Seconds between flushes to disk.
            least: The life's number at least; a life may have ended before its first item did.
        """
        self._session = (session, fsync_s)
        self.session_number = max(
            least, 1 + (parse_session_number(self._paths[-1]) if self._paths else 0)
        )

    def put(self, record: dict[str, Json]) -> None:
        """Record how an item ended; on return it is safe from the end of this process.

        Needs a running event loop.

        Raises:
            TypeError: JSON has no form for a value in the record; nothing was written.
            JournalError: It could not be written; says how many items are safe. Every later call
                raises the same.
        """
        if self._failure is not None:
            raise self._failure
        if self._session is None:
            raise JournalError(f"{self._folder}: the ledger is open for reading only")
        try:
            writer = self._writer or self._open_writer(*self._session)
            start, length = writer.write(record)
        except JournalError as error:
            self._failure = self._explain_failure(error)
            raise self._failure from error
        facts = make_record_key(record)
        self._get_session_usage(self._own).add_numbers(facts[2:])
        self._ends[self._own] = start + length
        self._index_record(self._own, start, length, facts)

    def _explain_failure(self, error: JournalError) -> JournalError:
        return JournalError(
            f"{error.message}. {self.describe_saved()}; make room or mend the permissions, then "
            "resume"
        )

    def describe_saved(self) -> str:
        """Say how many items will be read back, whatever becomes of this process."""
        at_risk = self._writer.at_risk if self._writer is not None else 0
        safe = len(self._state) - self._state.count(_OPEN) - at_risk
        return f"{safe:,} of {len(self._state):,} items are safe"

    def _open_writer(self, life: str, fsync_s: float) -> JournalWriter:
        path = self._folder / f"{self.session_number:04}.jsonl"
        self._writer = JournalWriter(
            path, {"run": get_current_run_id(self._run), "session": life}, fsync_s
        )
        self._own = len(self._paths)
        self._paths.append(path)
        return self._writer

    def extents(self) -> dict[str, int]:
        """Return how far each file has been read or written, in bytes, by its name."""
        return {path.name: end for path, end in zip(self._paths, self._ends, strict=False) if end}

    async def flush(self) -> None:
        """Wait until everything written so far is on disk, by the next common flush.

        Raises:
            JournalError: The disk refused; says how many items are safe.
        """
        if self._writer is None:
            return
        try:
            await self._writer.flush()
        except JournalError as error:
            self._failure = self._failure or self._explain_failure(error)
            raise self._failure from error

    async def aclose(self) -> None:
        """Flush and close all files.

        Raises:
            JournalError: Something could not be flushed, and nobody has been told yet.
        """
        try:
            if self._writer is not None:
                await self._close(self._writer)
        finally:
            self._writer = None
            self.close()

    async def _close(self, writer: JournalWriter) -> None:
        told, at_risk = self._failure is not None, writer.at_risk
        try:
            await writer.close()
        except JournalError as error:
            if not told or writer.at_risk > at_risk:
                self._failure = self._explain_failure(error)
                raise self._failure from error

    def close(self) -> None:
        """Close the files opened for reading."""
        self._handles.close()

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

    def refresh(
        self, delta: JournalDelta, all_sessions: bool = False, worker: str | None = None
    ) -> None:
        """Read what workers have written since the last call; blocks.

        Args:
            delta: Is told of items that had not ended before, also of those before an error.
            all_sessions: Whether those of earlier lives may still write, not only this one's.
            worker: Only this one of this life, as ``host:process``; there may be thousands.

        Raises:
            JournalError: A file is damaged, cannot be read, or belongs to another run.
        """
        begin = (
            f"{self.session_number:04}-"
            if worker is None
            else make_worker_prefix(self.session_number, worker)
        )
        pattern = "*-*.jsonl" if all_sessions and worker is None else f"{escape(begin)}*.jsonl"
        try:
            paths = sorted(self._folder.glob(pattern))
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot be listed: {error.strerror}") from error
        for path in paths:
            if path not in self._followed:
                self._followed[path] = _FollowedFile(len(self._paths))
                self._paths.append(path)
            self._read_on(path, self._followed[path], delta)

    def _read_on(
        self,
        path: Path,
        at: _FollowedFile,
        delta: JournalDelta | None = None,
        end: int | None = None,
    ) -> None:
        """Note a file's further records; count those of items that had not ended before.

        Args:
            path: The file.
            at: Where to read on.
            delta: Is told what is new; None: the file is read once, from its begin to its end.
            end: Where to end, in bytes.
        """
        live = delta is not None
        source = JournalSource(path, self._run)
        lines = scan_lines(source, at.start, at.line, at.crc, live=live)
        if end is not None:
            lines = takewhile(lambda line: line.start < end, lines)
        while some := list(map(index_line, islice(lines, _BATCH_LINES))):
            spent = sum_records([line.key for line in some], len(self._state))
            if spent is None:
                for line in scan_lines(source, at.start, at.line, at.crc, live=live):
                    check_line(line, source, len(self._state))
            new = [
                self._index_record(at.number, line.start, line.length, line.key) for line in some
            ]
            last = some[-1]
            at.start, at.line, at.crc = last.start + last.length, last.number + 1, last.crc
            assert spent is not None, "check_line has refused what does not add up"
            self._get_session_usage(at.number).merge(spent)
            self._ends[at.number] = at.start
            if delta is not None:
                delta.add_records([line.key for line in compress(some, new)])

    # -- reading -------------------------------------------------------------------------

    def count_items(self) -> ItemCounts:
        """Count the items by state."""
        state = self._state
        return ItemCounts(state.count(_DONE), state.count(_FAILED), state.count(_OPEN))

    def reopen_failed(self, before: int | None = None) -> int:
        """Treat failed items as open again; their records stay until newer ones come.

        Args:
            before: Only items that failed in a life before this one; None takes all.

        Returns:
            How many they are.
        """
        lives = [parse_session_number(path) for path in self._paths]
        failed = [
            index
            for index, state in enumerate(self._state)
            if state == _FAILED and (before is None or lives[self._file[index]] < before)
        ]
        for index in failed:
            self._state[index] = _OPEN
        return len(failed)

    def is_finished(self, index: int) -> bool:
        """Say whether an item has ended."""
        return self._state[index] != _OPEN

    def read_record(self, index: int) -> dict[str, Any]:
        """Read back the record of a finished item.

        Raises:
            JournalError: The journal changed under our feet.
        """
        return self._read(index, self._file[index], self._start[index], self._length[index])

    def _read(self, index: int, number: int, start: int, length: int) -> dict[str, Any]:
        path = self._paths[number]
        try:
            data = self._handles.read(path, start - PREVIOUS_CRC_BYTES, PREVIOUS_CRC_BYTES + length)
            line = data[PREVIOUS_CRC_BYTES:]
            whole = check_crc(line, parse_crc(data[:PREVIOUS_CRC_BYTES])) is not None
            record: dict[str, Any] = orjson.loads(line) if whole else {}
            record.pop("crc", None)
        except OSError as error:
            raise JournalError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError:  # neither a checksum nor JSON
            record = {}
        if record.get("index") != index:
            raise JournalError(f"{path}: changed while the run was using it")
        return record

    def read_records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records of finished items in input order, or those of one status."""
        wanted = _CODES[status] if status else None
        for index, state in enumerate(self._state):
            if state != _OPEN and wanted in (None, state):
                yield self.read_record(index)

    def _index_record(self, number: int, start: int, length: int, facts: RecordKey) -> bool:
        """Note where an item's record is; return whether the item had not ended before."""
        index = facts[0]
        ended = self._state[index] != _OPEN
        known = self._length[index] > 0  # also of a failed item that is asked again
        if known and not self._is_replacing(index, number, start, length):
            return False
        self._state[index] = _CODES[facts[1]]
        self._file[index], self._start[index], self._length[index] = number, start, length
        return not ended

    def _is_replacing(self, index: int, number: int, start: int, length: int) -> bool:
        """Say whether a further record of an item counts, rather than the one that is noted."""
        life, before = (parse_session_number(self._paths[n]) for n in (number, self._file[index]))
        if life < before:
            return False  # no session folds what an earlier one records from now on
        self.duplicates += self._state[index] != _OPEN
        if life > before:
            return True
        one = self._rank(index, number, start, length)
        other = self._rank(index, self._file[index], self._start[index], self._length[index])
        return one < other

    def _rank(self, index: int, *place: int) -> tuple[bool, str, str, int]:
        """Return what orders the records of an item within a session: the least one counts."""
        record = self._read(index, *place)
        number, start, _ = place
        failed = record["status"] != "done"
        return failed, str(record.get("finished_at")), self._paths[number].stem, start

    def _get_session_usage(self, number: int) -> UsageTotals:
        """Return the sums of the life that wrote a file."""
        while len(self._sums) <= number:
            life = parse_session_number(self._paths[len(self._sums)])
            self._sums.append(self.usage_by_session.setdefault(life, UsageTotals()))
            self._ends.append(0)
        return self._sums[number]

    def total_usage(self) -> UsageTotals:
        """Return what all lives have spent."""
        total = UsageTotals()
        for spent in self.usage_by_session.values():
            total.merge(spent)
        return total


def _end_in(extents: Mapping[str, int] | None, path: Path) -> int | None:
    """Return up to where a file is read, or None for all of it."""
    if extents is None or path.name in extents:
        return None if extents is None else extents[path.name]
    last = max((parse_session_number(Path(name)) for name in extents), default=0)
    return 0 if parse_session_number(path) <= last else None
