"""Index over all journal files of a run (17 bytes per item)."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import accumulate, compress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import orjson

from ..core.checksum import PREVIOUS_CRC_BYTES, check_crc, check_lines, parse_crc
from ..core.errors import JournalError
from ..core.money import UsageTotals
from ..core.types import Json
from ..core.values import check_counts
from .journal_file import (
    TAKEN_OVER_FILE,
    ItemCounts,
    JournalDelta,
    JournalSource,
    RecordKey,
    RunIds,
    check_line,
    check_renamed_files,
    get_current_run_id,
    index_lines,
    is_unchanged,
    make_record_key,
    make_worker_prefix,
    parse_answer,
    parse_session_number,
    scan_lines,
    sum_records,
)
from .journal_snapshot import FileEnd, JournalSnapshot, read_snapshot, write_snapshot
from .run_folder import write_json

if TYPE_CHECKING:
    from .journal_writer import JournalWriter

_MAX_OPEN_FILES: Final = 128
"""Files kept open. Processes have a low limit, and connections need most of it."""


class _Handle:
    """Open file; closed once neither the pool nor a reader refers to it."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class FileHandles:
    """Keep the most recently read files open; several threads may read at the same time.

    Args:
        most: Number of files kept open.
    """

    def __init__(self, most: int = _MAX_OPEN_FILES) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept = dict[Path, _Handle]()  # most recently read last

    def __len__(self) -> int:
        """Return the number of open files."""
        return len(self._kept)

    def read(self, path: Path, start: int, length: int) -> bytes:
        """Return a part of a file.

        Raises:
            OSError: The file cannot be opened or read.
        """
        with self._lock:
            handle = self._kept.pop(path, None) or _Handle(os.open(path, os.O_RDONLY))
            self._kept[path] = handle
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return os.pread(handle.number, length, start)

    def close(self) -> None:
        """Close all files; reads in progress still complete."""
        with self._lock:
            self._kept.clear()


_OPEN, _DONE, _FAILED = 0, 1, 2
"""States of an item; a failed one has ``_FAILED`` plus the number of its error class."""

_MOST_CLASSES: Final = 250
"""Error classes counted one by one. A ``task.graph`` may raise any class; a byte holds a state."""

OTHER_CLASSES: Final = "other classes"
"""Name of all further error classes."""

UNNAMED_CLASS: Final = "unknown class"
"""Name of the class of a record that has none."""

_MOST_GAP: Final = 4096
"""Bytes between two records up to which reading both at once costs less than reading twice."""
_MOST_TOGETHER: Final = 1 << 20
"""Bytes of records that are read together."""

_SNAPSHOT_BYTES: Final = 1 << 24
"""Bytes of journal files that take longer to parse than to save the index over them."""

_SHOWN_FILES: Final = 3
"""Missing files that a message names."""


@dataclass(slots=True)
class _FollowedFile:
    """A file: its number, and the position to continue from."""

    number: int
    start: int = 0
    line: int = 1
    crc: int = 0


class Journal:
    """Index over the journal files of one run; writable when opened for a new session.

    The index holds 17 bytes per item: its state and the position of its record. The records stay
    on disk. Several threads may read at the same time; one event loop writes.

    The workers of a session write their own files beside the coordinator's
    (``0002-node17-4242.jsonl`` beside ``0002.jsonl``); :meth:`refresh` reads their new lines. Of
    several records of an item, the one of the latest session counts. Within a session an answer
    precedes a failure; otherwise the record that was finished first counts. The result does not
    depend on the order of reading.

    Args:
        folder: The journal's folder.
        run: The run's ids; new files carry the current one.
        items: Number of items of the run.
        extents: Result of :meth:`extents` when the run's aggregate was written. Later records of
            the sessions up to then are not read, so that records and aggregate agree.
        live: Whether a process may be writing: what has not arrived whole is read later, by
            :meth:`follow`, and is no damage.

    Attributes:
        usage_by_session: Usage by session number, including records that do not count.
        on_record: Called with the index of each item whose record is new or replaced, in the thread
            that reads or writes it; None calls nothing.
        duplicates: Records that replaced another one, or of the same session as the one that
            counts; the aggregate of their items may differ from the journal.

    Raises:
        JournalError: A file is damaged or belongs to another run.
    """

    def __init__(
        self,
        folder: Path,
        run: RunIds,
        items: int,
        extents: Mapping[str, int] | None = None,
        *,
        live: bool = False,
    ) -> None:
        self._folder, self._run = folder, run
        self._paths = sorted(
            folder.glob("*.jsonl"), key=lambda path: (parse_session_number(path), path.stem)
        )
        self._followed: dict[Path, _FollowedFile] = {}
        self._handles = FileHandles()
        self._writer: JournalWriter | None = None
        self._own = -1
        self._session: tuple[str, float] | None = None
        self.session_number = 0
        self.on_record: Callable[[int], None] | None = None
        self.duplicates = 0
        self._failure: JournalError | None = None
        self.usage_by_session: dict[int, UsageTotals] = {}
        self._sums: list[UsageTotals] = []
        self._ends: list[int] = []
        self._reopened = bytearray()
        self._saved_bytes = 0
        self._check_names()
        if extents is not None or not self._load_snapshot(items):
            self._state = bytearray(items)
            self._classes = dict[str, int]()
            self._file = array("i", [0]) * items  # 17 bytes per item in all; from bytes: more
            self._start = array("q", [0]) * items
            self._length = array("i", [0]) * items
        for number, path in enumerate(self._paths):
            at = self._followed.setdefault(path, _FollowedFile(number))
            self._read_on(path, at, JournalDelta() if live else None, _end_in(extents, path))

    def _check_names(self) -> None:
        try:
            check_renamed_files(self._folder, self._run)
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot be listed: {error.strerror}") from error

    def _load_snapshot(self, items: int) -> bool:
        """Begin with the index that an earlier session saved, if its files are unchanged."""
        found = read_snapshot(self._folder, self._run, items)
        if found is None:
            return False
        paths = [self._folder / one.name for one in found.files]
        if len(set(paths)) < len(paths) or not set(paths) <= set(self._paths):
            return False
        for path, one in zip(paths, found.files, strict=True):
            if not is_unchanged(JournalSource(path, self._run), one.end, one.line, one.crc):
                return False
        known = set(paths)
        new = [path for path in self._paths if path not in known]
        if new and new[0].name == TAKEN_OVER_FILE:  # it is the first file
            return False
        self._paths = paths + new
        self._state, self._classes = found.states, found.classes
        self._file, self._start, self._length = found.numbers, found.starts, found.lengths
        self.duplicates, self.usage_by_session = found.duplicates, found.usage
        for number, (path, one) in enumerate(zip(paths, found.files, strict=True)):
            self._followed[path] = _FollowedFile(number, one.end, one.line, one.crc)
            if one.end:
                self._get_session_usage(number)
                self._ends[number] = one.end
        self._saved_bytes = sum(self._ends)
        return True

    def save_snapshot(self, least_bytes: int = _SNAPSHOT_BYTES) -> None:
        """Save the index, so that what it is of need not be parsed again; blocks.

        Only for the process that has locked the run, and while no item ends.

        Args:
            least_bytes: Bytes of the journal that no saved index is of, below which none is saved.

        Raises:
            JournalError: It cannot be written.
        """
        if self._failure is not None or sum(self._ends) - self._saved_bytes < least_bytes:
            return
        states = bytearray(self._state)
        if self._reopened:  # in the journal these items have failed
            index = states.find(_OPEN)
            while index >= 0:
                if self._length[index]:
                    states[index] = self._reopened[index]
                index = states.find(_OPEN, index + 1)
        followed = [(path.name, self._followed[path]) for path in self._paths]
        files = [FileEnd(name, at.start, at.line, at.crc) for name, at in followed]
        columns = states, self._file, self._start, self._length
        usage = self.usage_by_session
        snapshot = JournalSnapshot(files, self._classes, self.duplicates, usage, *columns)
        write_snapshot(self._folder, self._run, snapshot)
        self._saved_bytes = sum(self._ends)

    # -- writing -------------------------------------------------------------------------

    def start_session(self, session: str, fsync_s: float, least: int = 1) -> None:
        """Allow writing; the new journal file is created when the first item ends.

        Args:
            session: Description, in the file's header, of the process that writes it.
            fsync_s: Seconds between flushes to disk.
            least: Lower bound of the session number, since a session may end before any item.
        """
        self._session = (session, fsync_s)
        self.session_number = max(
            [least, *(1 + parse_session_number(path) for path in self._paths)]
        )

    def put(self, record: dict[str, Json]) -> None:
        """Record the end of an item; on return the record survives the end of this process.

        Needs a running event loop.

        Raises:
            TypeError: A value of the record has no JSON form; nothing was written.
            JournalError: The record could not be written; the message says how many items are
                safe. Every later call raises the same error.
        """
        if self._failure is not None:
            raise self._failure
        if self._session is None:
            raise JournalError(f"{self._folder}: the journal is open for reading only")
        try:
            writer = self._writer or self._open_writer(*self._session)
            start, length = writer.write(record)
        except JournalError as error:
            self._failure = self._explain_failure(error)
            raise self._failure from error
        facts = make_record_key(record)
        self._get_session_usage(self._own).add_numbers(facts[3:])
        self._ends[self._own] = start + length
        self._index_record(self._own, start, length, facts)

    def _explain_failure(self, error: JournalError) -> JournalError:
        return JournalError(
            f"{error.message}. {self.describe_saved()}; free disk space or fix the permissions, "
            "then resume"
        )

    def describe_saved(self) -> str:
        """Return how many items can be read back after this process ends, in words."""
        at_risk = self._writer.at_risk if self._writer is not None else 0
        safe = len(self._state) - self._state.count(_OPEN) - at_risk
        return f"{safe:,} of {len(self._state):,} items are safe"

    def _open_writer(self, session: str, fsync_s: float) -> JournalWriter:
        from .journal_writer import JournalWriter  # noqa: PLC0415 - readers need no event loop

        path = self._folder / f"{self.session_number:04}.jsonl"
        self._writer = JournalWriter(
            path, {"run": get_current_run_id(self._run), "session": session}, fsync_s
        )
        self._own = len(self._paths)
        self._paths.append(path)
        return self._writer

    def extents(self) -> dict[str, int]:
        """Return, by file name, how many bytes have been read or written."""
        return {path.name: end for path, end in zip(self._paths, self._ends, strict=False) if end}

    async def flush(self) -> None:
        """Wait until everything written so far is on disk, by the next common flush.

        Raises:
            JournalError: The flush failed; the message says how many items are safe.
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
            JournalError: A flush failed and has not been reported yet.
        """
        try:
            if self._writer is not None:
                await self._close(self._writer)
        finally:
            self._writer = None
            self.close()

    async def _close(self, writer: JournalWriter) -> None:
        was_reported, at_risk = self._failure is not None, writer.at_risk
        self._followed[self._paths[self._own]] = _FollowedFile(self._own, *writer.position)
        try:
            await writer.close()
        except JournalError as error:
            if not was_reported or writer.at_risk > at_risk:
                self._failure = self._explain_failure(error)
                raise self._failure from error

    def close(self) -> None:
        """Close the files opened for reading."""
        self._handles.close()

    def __enter__(self) -> Self:
        """Return the journal for reading."""
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
            delta: Receives items that had not ended before, also those read before an error.
            all_sessions: Whether workers of earlier sessions may still write.
            worker: Read only this worker's files (``host:process``); there may be thousands.

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
        self._read_files(paths, delta)

    def follow(self) -> None:
        """Read what the run's processes have written since, when this one only reads; blocks.

        Raises:
            JournalError: A file is damaged, cannot be read, or belongs to another run.
        """
        self._check_names()
        self._read_files(sorted(self._folder.glob("*.jsonl")), JournalDelta())

    def _read_files(self, paths: Iterable[Path], delta: JournalDelta) -> None:
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
        """Index a file's further records; count those of items that had not ended before.

        Args:
            path: The file.
            at: Position to continue from.
            delta: Receives what is new; None: the file is read once, from start to end.
            end: Position to stop at, in bytes.
        """
        live = delta is not None
        source = JournalSource(path, self._run)
        for some in index_lines(source, at.start, at.line, at.crc, live=live, end=end):
            spent = sum_records(some.keys, len(self._state))
            if spent is None:
                for line in scan_lines(source, at.start, at.line, at.crc, live=live):
                    check_line(line, source, len(self._state))
            starts = accumulate(some.lengths[:-1], initial=some.start)
            new = self._index_records(at.number, starts, some.lengths, some.keys)
            at.start, at.line, at.crc = some.end, some.number + 1, some.crc
            assert spent is not None, "check_line refuses records that do not add up"
            self._get_session_usage(at.number).merge(spent)
            self._ends[at.number] = at.start
            if delta is not None:
                delta.add_records(list(compress(some.keys, new)))

    # -- reading -------------------------------------------------------------------------

    def count_items(self) -> ItemCounts:
        """Count the items by state."""
        done, still_open = self._state.count(_DONE), self._state.count(_OPEN)
        failed = len(self._state) - done - still_open
        return ItemCounts(done, failed, still_open, self._count_taken_over())

    def is_taken_over(self, index: int) -> bool:
        """Return True if the record of an item was taken over from another run."""
        path = self._paths[self._file[index]] if self._length[index] else None
        return path is not None and path.name == TAKEN_OVER_FILE

    def _count_taken_over(self) -> int:
        """Count the items whose record was taken over; that file is the first one."""
        if not self._paths or self._paths[0].name != TAKEN_OVER_FILE:
            return 0
        return self._file.count(0) - self._length.count(0)  # items without a record name no file

    def count_failures(self) -> dict[str, int]:
        """Count the failed items by error class, most frequent first; reads no record."""
        if self.count_items().failed == 0:
            return {}
        counts = {name: self._state.count(code) for name, code in tuple(self._classes.items())}
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        return {name: count for name, count in ranked if count}

    def find_failed(self, error_class: str) -> Iterator[int]:
        """Yield the indices of the items that failed with an error class, in input order."""
        code = self._classes.get(error_class)
        index = -1 if code is None else self._state.find(code)
        while code is not None and index >= 0:
            yield index
            index = self._state.find(code, index + 1)

    def reopen_failed(self, before: int | None = None) -> int:
        """Treat failed items as open again; their records stay until newer ones are written.

        Args:
            before: Only items that failed in a session before this one; None for all.

        Returns:
            Number of items.
        """
        sessions = [parse_session_number(path) for path in self._paths]
        failed = [
            index
            for index, state in enumerate(self._state)
            if state >= _FAILED and (before is None or sessions[self._file[index]] < before)
        ]
        if failed and not self._reopened:
            self._reopened = bytearray(len(self._state))
        for index in failed:
            self._reopened[index], self._state[index] = self._state[index], _OPEN
        return len(failed)

    def is_finished(self, index: int) -> bool:
        """Return True if an item has ended."""
        return self._state[index] != _OPEN

    def get_last_session(self, index: int) -> int:
        """Return the session of an item's record, also of one that is reopened; 0 without one."""
        if not self._length[index]:
            return 0
        return parse_session_number(self._paths[self._file[index]])

    def is_done(self, index: int) -> bool:
        """Return True if an item has an answer."""
        return self._state[index] == _DONE

    def read_record(self, index: int) -> dict[str, Any]:
        """Read back the record of a finished item.

        Raises:
            JournalError: The journal changed during the run.
        """
        return self._read(index, self._file[index], self._start[index], self._length[index])

    def _read(self, index: int, number: int, start: int, length: int) -> dict[str, Any]:
        data = self._read_bytes(number, start - PREVIOUS_CRC_BYTES, PREVIOUS_CRC_BYTES + length)
        return self._decode(index, number, data)

    def _read_bytes(self, number: int, start: int, length: int) -> bytes:
        try:
            return self._handles.read(self._paths[number], start, length)
        except OSError as error:
            msg = f"{self._paths[number]}: cannot be read: {error.strerror}"
            raise JournalError(msg) from error

    def _decode(self, index: int, number: int, data: bytes) -> dict[str, Any]:
        """Return a record from its line, and the checksum before it."""
        line = data[PREVIOUS_CRC_BYTES:]
        try:
            is_whole = check_crc(line, parse_crc(data[:PREVIOUS_CRC_BYTES])) is not None
        except ValueError:  # not a checksum
            is_whole = False
        return self._parse(index, number, line if is_whole else b"{}")

    def _parse(self, index: int, number: int, line: bytes) -> dict[str, Any]:
        """Return the record of a line."""
        try:
            record: dict[str, Any] = orjson.loads(line)
            record.pop("crc", None)
        except ValueError:  # not JSON
            record = {}
        if record.get("index") != index:
            raise JournalError(f"{self._paths[number]}: changed while the run was using it")
        return record

    def find_open(self, lo: int, hi: int) -> int:
        """Return the first item of a range that has not ended; ``hi`` if all have."""
        found = self._state.find(_OPEN, lo, hi)
        return hi if found < 0 else found

    def read_answers(self, lo: int, hi: int, *, whole: bool = False) -> list[dict[str, Any] | None]:
        """Read back how the items of a range ended; None for those that have not.

        Records that lie close to each other in a file are read together.

        Args:
            lo: Index of the first item.
            hi: Index after the last item.
            whole: Return all of each record, not only ``status``, ``output`` and ``error_class``.

        Raises:
            JournalError: The journal changed during the run.
        """
        found: list[dict[str, Any] | None] = [None] * (hi - lo)
        places = sorted(
            (self._file[index], self._start[index] - PREVIOUS_CRC_BYTES, index)
            for index in range(lo, hi)
            if self._state[index] != _OPEN
        )
        at = 0
        while at < len(places):
            number, begin, index = places[at]
            stop, after = begin + PREVIOUS_CRC_BYTES + self._length[index], at + 1
            while after < len(places):
                file, start, index = places[after]
                end = start + PREVIOUS_CRC_BYTES + self._length[index]
                if file != number or start > stop + _MOST_GAP or end - begin > _MOST_TOGETHER:
                    break
                stop, after = end, after + 1
            data = self._read_bytes(number, begin, stop - begin)
            self._decode_all(places[at:after], data, found, lo, whole=whole)
            at = after
        return found

    def _decode_all(
        self,
        places: Sequence[tuple[int, int, int]],
        data: bytes,
        found: list[dict[str, Any] | None],
        lo: int,
        *,
        whole: bool,
    ) -> None:
        """Decode records that were read together; lines without a gap are checked together.

        Args:
            places: File, position of the checksum before the line, and index of each record.
            data: What was read, from the first position on.
            found: Receives the records.
            lo: Index of the first one of the list.
            whole: Whether all of each record is wanted.
        """
        begin, sizes = places[0][1], [self._length[index] for _, _, index in places]
        heads = [start - begin + PREVIOUS_CRC_BYTES for _, start, _ in places]
        lines = [data[head : head + size] for head, size in zip(heads, sizes, strict=True)]
        at = 0
        while at < len(places):
            number, start, after = places[at][0], heads[at], at + 1
            while after < len(places) and heads[after] == heads[after - 1] + sizes[after - 1]:
                after += 1
            try:
                before = parse_crc(data[start - PREVIOUS_CRC_BYTES : start])
                is_whole = check_lines(lines[at:after], before)
            except ValueError:  # not a checksum
                is_whole = False
            for (_, _, index), line in zip(places[at:after], lines[at:after], strict=True):
                answer = None
                if is_whole and not whole and self._state[index] == _DONE:
                    answer = parse_answer(line, index)
                if answer is None:
                    answer = self._parse(index, number, line if is_whole else b"{}")
                found[index - lo] = answer
            at = after

    def read_records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records of finished items in input order; optionally of one status only."""
        wanted = {"done": (_DONE,), "failed": range(_FAILED, 256)}.get(status or "", range(1, 256))
        for index, state in enumerate(self._state):
            if state in wanted:
                yield self.read_record(index)

    def _index_records(
        self,
        number: int,
        starts: Iterable[int],
        lengths: Iterable[int],
        keys: Iterable[RecordKey],
    ) -> list[bool]:
        """Index records of a file; return for each whether its item had not ended before."""
        new, is_simple = list[bool](), self.on_record is None
        states, files, begins, sizes = self._state, self._file, self._start, self._length
        for start, length, key in zip(starts, lengths, keys, strict=True):
            index = key[0]
            if is_simple and key[1] == "done" and not sizes[index]:
                states[index] = _DONE
                files[index], begins[index], sizes[index] = number, start, length
                new.append(True)
            else:
                new.append(self._index_record(number, start, length, key))
        return new

    def _index_record(self, number: int, start: int, length: int, facts: RecordKey) -> bool:
        """Index a record; return True if its item had not ended before."""
        index = facts[0]
        ended = self._state[index] != _OPEN
        known = self._length[index] > 0  # also for a failed item that runs again
        if known and not self._is_replacing(index, number, start, length):
            return False
        self._state[index] = _DONE if facts[1] == "done" else self._class_code(facts[2])
        self._file[index], self._start[index], self._length[index] = number, start, length
        if self.on_record is not None:
            self.on_record(index)
        return not ended

    def _class_code(self, name: object) -> int:
        """Return the state of an item that failed with an error class."""
        name = name if isinstance(name, str) and name else UNNAMED_CLASS
        if name not in self._classes and len(self._classes) >= _MOST_CLASSES:
            name = OTHER_CLASSES
        return self._classes.setdefault(name, _FAILED + len(self._classes))

    def _is_replacing(self, index: int, number: int, start: int, length: int) -> bool:
        """Return True if a further record of an item counts more than the indexed one."""
        session, before = (
            parse_session_number(self._paths[n]) for n in (number, self._file[index])
        )
        if session < before:
            return False  # an earlier session's record no longer changes this session's result
        self.duplicates += self._state[index] != _OPEN
        if session > before:
            return True
        one = self._rank(index, number, start, length)
        other = self._rank(index, self._file[index], self._start[index], self._length[index])
        return one < other

    def _rank(self, index: int, *position: int) -> tuple[bool, str, str, int]:
        """Return the sort key of an item's records within a session; the least record counts."""
        record = self._read(index, *position)
        number, start, _ = position
        failed = record["status"] != "done"
        return failed, str(record.get("finished_at")), self._paths[number].stem, start

    def _get_session_usage(self, number: int) -> UsageTotals:
        """Return the sums of the session that wrote a file."""
        while len(self._sums) <= number:
            session = parse_session_number(self._paths[len(self._sums)])
            self._sums.append(self.usage_by_session.setdefault(session, UsageTotals()))
            self._ends.append(0)
        return self._sums[number]

    def total_usage(self) -> UsageTotals:
        """Return the usage of all sessions."""
        return UsageTotals.total(self.usage_by_session.values())


EXTENTS_FILE: Final = "extents.json"
"""Sizes of the journal files of a run, when a session last opened or closed it."""


def write_extents(folder: Path, extents: Mapping[str, int]) -> None:
    """Record which files the journal has, and how far they were read or written.

    Raises:
        JournalError: The file cannot be written.
    """
    write_json(folder / EXTENTS_FILE, {"v": 1, "bytes": extents})


def list_lost_files(folder: Path) -> list[str]:
    """Return a sentence for each file of the journal that is missing or shorter than recorded.

    Raises:
        JournalError: The record of the files is damaged.
    """
    record = folder / EXTENTS_FILE
    try:
        extents: dict[str, int] = orjson.loads(record.read_bytes())["bytes"]
        check_counts(extents, extents, "bytes")
    except FileNotFoundError:
        return []  # no session has opened the run yet
    except OSError as error:
        raise JournalError(f"{record}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{record}: damaged ({error}); remove it, and the next session writes it again"
        raise JournalError(msg) from None
    lost = []
    for name, size in extents.items():
        path = folder / name
        now = path.stat().st_size if path.exists() else None
        if now is None:
            lost.append(f"{path} is missing: it had {size:,} bytes of records")
        elif now < size:
            lost.append(f"{path} has {now:,} bytes, and had {size:,}: its last records are missing")
    return lost


def describe_lost_files(lost: Sequence[str], journal: Journal) -> str:
    """Return what it means for a run that files of its journal are missing, in words."""
    shown = "; ".join(lost[:_SHOWN_FILES])
    more = f"; and {len(lost) - _SHOWN_FILES} more" if len(lost) > _SHOWN_FILES else ""
    counts = journal.count_items()
    total = counts.done + counts.failed + counts.open
    return (
        f"{shown}{more}. Items whose only record was there are asked and paid again: "
        f"{counts.open:,} of {total:,} items are open. To keep their answers, put the files back "
        "while no session runs"
    )


def _end_in(extents: Mapping[str, int] | None, path: Path) -> int | None:
    """Return the position up to which a file is read, or None for all of it."""
    if extents is None or path.name in extents:
        return None if extents is None else extents[path.name]
    last = max((parse_session_number(Path(name)) for name in extents), default=0)
    return 0 if parse_session_number(path) <= last else None
