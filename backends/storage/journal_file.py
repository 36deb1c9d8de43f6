"""Append-only journal files: header, scan, line checks, sums of records."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, Final, NamedTuple, TypeAlias

import orjson

from ..core.checksum import CRC_END, CRC_FIELD, CRC_TAIL_BYTES, check_crc, check_each_line
from ..core.errors import JournalError
from ..core.money import UsageTotals
from ..core.terminal import count_nouns
from ..core.types import Json
from ..core.values import COUNT_FIELDS, MAX_COUNT, STATUSES, check_record

JOURNAL_VERSION: Final = 2

TAKEN_OVER_FILE: Final = "0000.jsonl"
"""Journal file of the records that a new run takes over: of the session before its first."""

_LONGEST_HEADER: Final = 4096
_BATCH_LINES: Final = 256
"""Lines that are checked and summed together."""
_BLOCK_BYTES: Final = 1 << 18
"""Bytes that are compared together."""
_OTHER_FILES: Final = ("heartbeat-", "task-", "stop-", "lock")
"""Prefixes of the names of other files in a journal's folder."""

RunIds: TypeAlias = str | tuple[str, ...]
"""Run id; for a copied run folder, the current id followed by the earlier ones."""


def make_header(path: Path, kind: str, about: Mapping[str, Json]) -> bytes:
    """Return the first line of a new file.

    Args:
        path: The file.
        kind: ``journal`` or ``budget``.
        about: ``run`` (the run's id) and the writer.
    """
    identity = {"kind": kind, "name": path.stem, "file": secrets.token_hex(8)}
    return orjson.dumps({"v": JOURNAL_VERSION, "run": about["run"], **identity, **about})


class JournalLine(NamedTuple):
    """One record of a journal file.

    Attributes:
        number: Number of the line, from 1.
        start: Start of the line in bytes.
        length: Length in bytes, line end included.
        crc: Checksum of the line.
        record: Content of the line.
    """

    number: int
    start: int
    length: int
    crc: int
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JournalSource:
    """File to read, and what identifies it as a file of the run.

    Attributes:
        path: The file.
        run: The run's ids; the first line of the file must have one of them.
        kind: ``journal`` or ``budget``.
    """

    path: Path
    run: RunIds
    kind: str = "journal"

    def make_error(self, number: int, what: str) -> JournalError:
        """Return an error that names the line."""
        return JournalError(f"{self.path}, line {number}: {what}")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; to open a pipe could wait forever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(handle, "rb")


def scan_lines(
    source: JournalSource, start: int = 0, first: int = 1, before: int = 0, *, live: bool = False
) -> Iterator[JournalLine]:
    """Yield the records of one file; skip a torn last line.

    Args:
        source: The file.
        start: Start offset in bytes.
        first: Number of the line at that offset.
        before: Checksum of the previous line.
        live: Whether the file is still being written; reading then stops at the first line with
            NUL bytes. Network file systems show zeros where another node's data has not arrived.

    Raises:
        JournalError: Any other irregularity, with file and line.
    """
    try:
        with open_regular(source.path) as file:
            file.seek(start)
            for number, line in enumerate(file, first):
                if live and b"\0" in line:
                    return
                if not line.endswith(b"\n"):
                    _check_torn(source, line, number, start, before)
                    return
                crc = check_crc(line, before)
                if crc is None:
                    raise _mismatch(source, line, number, start)
                record = _parse(source, line, number)
                if number == 1:
                    _check_header(source, record)
                else:
                    yield JournalLine(number, start, len(line), crc, record)
                start, before = start + len(line), crc
    except OSError as error:
        raise JournalError(f"{source.path}: cannot be read: {error.strerror}") from error


def _check_torn(source: JournalSource, line: bytes, number: int, start: int, before: int) -> None:
    """Accept a line cut off by the end of the process; no process writes NUL bytes.

    A line with text after its checksum was complete: its end has been changed.
    """
    if b"\0" in line:
        msg = (
            f"{line.count(0):,} NUL bytes, as a power failure leaves them; everything before them "
            f"is intact: remove them with '{_cut(source.path, start)}', then resume"
        )
        raise source.make_error(number, msg)
    at = line.find(CRC_FIELD)
    while at >= 0:
        end = at + CRC_TAIL_BYTES - 1
        if len(line) > end and check_crc(line[:end] + b"\n", before) is not None:
            raise _mismatch(source, line, number, start)
        at = line.find(CRC_FIELD, at + 1)


def _mismatch(source: JournalSource, line: bytes, number: int, start: int) -> JournalError:
    """Return the error of a line that does not match its checksum."""
    found = _header_in(line)
    if number == 1 and found is not None and found.get("v") != JOURNAL_VERSION:
        return source.make_error(1, _other_version(found))
    if number > 1 and found is not None and check_crc(line, 0) is not None:
        what = "a second header: another file was appended to this one"
    elif line.endswith(CRC_END) and line[-CRC_TAIL_BYTES:].startswith(CRC_FIELD):
        what = (
            "the checksum does not match: the line was changed, or lines before it were removed, "
            "repeated or moved"
        )
    else:
        what = "not a complete line with a checksum; the file was damaged or edited"
    way_out = "restore the file from a copy"
    if source.kind == "journal":
        way_out += (
            f", or cut it off here with '{_cut(source.path, start)}': the items of this and all "
            "later lines then run again"
        )
    return source.make_error(number, f"{what}; {way_out}")


def _cut(path: Path, size: int) -> str:
    return f"truncate -s {size} {shlex.quote(str(path))}"


def _header_in(line: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "v" in found else None


def _parse(source: JournalSource, line: bytes, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        msg = f"not valid JSON ({error}); the file was damaged or edited"
        raise source.make_error(number, msg) from None
    if not isinstance(record, dict):
        raise source.make_error(number, "not a journal record")
    record.pop("crc", None)
    return record


def get_current_run_id(run: RunIds) -> str:
    """Return the current id of a run."""
    return run if isinstance(run, str) else run[0]


def _other_version(record: dict[str, Any]) -> str:
    return f"journal version {record.get('v')!r}, this fanfold reads {JOURNAL_VERSION}"


def _check_header(source: JournalSource, record: dict[str, Any]) -> None:
    if record.get("v") != JOURNAL_VERSION:
        raise source.make_error(1, _other_version(record))
    if not is_own_run(record.get("run"), source.run):
        found, own = record.get("run"), get_current_run_id(source.run)
        raise source.make_error(1, f"belongs to run {found!r}, not to {own!r}")
    kind, name = record.get("kind"), record.get("name")
    if (kind, name) != (source.kind, source.path.stem):
        raise source.make_error(
            1,
            f"the file is {kind}/{name}.jsonl of this run under another name: remove it if it is a "
            "copy, or else rename it back",
        )


def is_own_run(found: object, run: RunIds) -> bool:
    """Return True if a value is one of a run's ids."""
    return found in ((run,) if isinstance(run, str) else run)


def check_renamed_files(folder: Path, run: RunIds) -> None:
    """Refuse a folder in which a renamed file of the run would be ignored.

    Args:
        folder: The folder.
        run: The run's ids.

    Raises:
        JournalError: A file with a header of the run has a name that does not end in ``.jsonl``,
            and its original name does not exist.
    """
    for path in sorted(folder.iterdir()):
        signs = path.name.startswith(_OTHER_FILES)  # with many workers there are thousands
        if signs or path.suffix == ".jsonl" or not path.is_file():
            continue
        with path.open("rb") as file:
            header = _header_in(file.readline(_LONGEST_HEADER))
        if header is None or not is_own_run(header.get("run"), run):
            continue
        proper = folder / f"{header.get('name')}.jsonl"
        if not proper.exists():
            msg = f"{path}, line 1: the file is {proper.name} of this run; rename it back"
            raise JournalError(msg)


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """Number of items that are done, failed, and open.

    Attributes:
        taken_over: Items whose record was taken over from another run, at no cost.
    """

    done: int
    failed: int
    open: int
    taken_over: int = 0


@dataclass(slots=True)
class JournalDelta:
    """Items that have ended since the last report.

    Attributes:
        done: Items with an answer.
        failed: Items without an answer.
        usage: Their usage.
    """

    done: int = 0
    failed: int = 0
    usage: UsageTotals = field(default_factory=UsageTotals)

    def add_records(self, facts: Sequence[RecordKey]) -> None:
        """Add records by their keys."""
        done = sum(status == "done" for _, status, *_ in facts)
        self.done, self.failed = self.done + done, self.failed + len(facts) - done
        self.usage.merge(UsageTotals.from_numbers(numbers for _, _, _, *numbers in facts))


_NUMBER: Final = frozenset({int, NoneType})
_INDEX: Final = frozenset({int})
_TEXT: Final = frozenset({str})
_STATUS: Final = frozenset(STATUSES)
_KEY_FIELDS: Final = ("index", "status", "error_class", *COUNT_FIELDS)
_get_key_fields: Final = itemgetter(*_KEY_FIELDS)


def parse_session_number(path: Path) -> int:
    """Return the number of the session that wrote a journal file.

    Raises:
        JournalError: The file is not a journal file.
    """
    session = path.stem.partition("-")[0]
    if not (session.isascii() and session.isdigit()):
        msg = f"{path}: not a journal file of fanfold; move it out of the run folder"
        raise JournalError(msg)
    return int(session)


RecordKey = tuple[Any, ...]
"""Index, status, error class and :data:`COUNT_FIELDS` of a record; missing fields are None."""


def make_record_key(record: dict[str, Any]) -> RecordKey:
    """Return the part of a record that stays in memory."""
    try:
        facts: RecordKey = _get_key_fields(record)
    except KeyError:
        return tuple(map(record.get, _KEY_FIELDS))
    return facts


_OUTPUT: Final = b',"output":'
_AFTER_OUTPUT: Final = b',"error_class":null,'


def parse_answer(line: bytes, index: int) -> dict[str, Any] | None:
    """Return status, output and error class of an answered item, without the rest of the record.

    Takes a fifth of the time of the whole record. What is found is the output: before it a record
    has only texts and numbers, in whose JSON no quotation mark follows a comma; and what does not
    end with the output is not valid JSON.

    Args:
        line: The line of an item with an answer.
        index: The item.

    Returns:
        The values, or None if only the whole record shows them.
    """
    at = line.find(_OUTPUT)
    end = line.find(_AFTER_OUTPUT, at)
    if at < 0 or end < 0 or line.find(b',"index":%d,' % index, 0, at) < 0:
        return None
    try:
        output = orjson.loads(line[at + len(_OUTPUT) : end])
    except orjson.JSONDecodeError:
        return None
    return {"status": "done", "output": output, "error_class": None}


def make_worker_prefix(session: int, worker: str) -> str:
    """Return the prefix of the names of a worker's journal files.

    Args:
        session: Number of the coordinator's session.
        worker: Host and process, e.g. ``node17:4242``.
    """
    return f"{session:04}-{worker.replace(':', '-').replace('/', '-')}-"


def make_worker_path(folder: Path, session: int, worker: str) -> Path:
    """Return the path of a new journal file for a worker in one session.

    Host and process do not identify a worker permanently: two containers may have the same ones.

    Args:
        folder: The journal's folder.
        session: Number of the coordinator's session.
        worker: Host and process, e.g. ``node17:4242``.
    """
    return folder / f"{make_worker_prefix(session, worker)}{secrets.token_hex(3)}.jsonl"


class IndexedLines(NamedTuple):
    """What stays in memory of some lines of a file that follow each other.

    Attributes:
        keys: Key of each record.
        lengths: Length of each line in bytes.
        start: Start of the first line in bytes.
        end: End of the last line in bytes.
        number: Number of the last line, from 1.
        crc: Checksum of the last line.
    """

    keys: list[RecordKey]
    lengths: list[int]
    start: int
    end: int
    number: int
    crc: int


def index_lines(  # noqa: PLR0913 - where to begin, and where to end
    source: JournalSource,
    start: int = 0,
    first: int = 1,
    before: int = 0,
    *,
    live: bool = False,
    end: int | None = None,
) -> Iterator[IndexedLines]:
    """Yield what stays in memory of the records of one file; several times as fast as the records.

    Lines that are as they should be are checked here. At any other line :func:`scan_lines` takes
    over, which knows what it means.

    Args:
        source: The file.
        start: Start offset in bytes.
        first: Number of the line at that offset.
        before: Checksum of the previous line.
        live: Whether the file is still being written.
        end: Position after which no further line starts, in bytes.

    Raises:
        JournalError: An irregularity, with file and line.
    """
    least = sys.maxsize if end is None else end
    number, crc, is_regular = first, before, True
    try:
        with open_regular(source.path) as file:
            file.seek(start)
            while is_regular and (lines := list(islice(file, _BATCH_LINES))):
                keys, lengths, begin = list[RecordKey](), list[int](), start
                for line in lines:
                    found = check_crc(line, crc)
                    record = None if found is None else _read_object(line)
                    if found is None or record is None:
                        is_regular = False
                        break
                    if number == 1:
                        _check_header(source, record)
                        begin = start + len(line)
                    elif start < least:
                        lengths.append(len(line))
                        keys.append(
                            _make_checked_key(record)
                            if "shares" in record
                            else make_record_key(record)
                        )
                    else:
                        least = -1
                        break
                    number, crc, start = number + 1, found, start + len(line)
                if keys:
                    yield IndexedLines(keys, lengths, begin, start, number - 1, crc)
                if least < 0:
                    return
    except OSError as error:
        raise JournalError(f"{source.path}: cannot be read: {error.strerror}") from error
    if not is_regular:
        for one in scan_lines(source, start, number, crc, live=live):
            if one.start >= least:
                return
            key, after = _make_checked_key(one.record), one.start + one.length
            yield IndexedLines([key], [one.length], one.start, after, one.number, one.crc)


def is_unchanged(source: JournalSource, end: int, line: int, crc: int) -> bool:
    """Return True if a file begins with the lines that were read from it earlier.

    Several times as fast as reading them: of each line only the checksum is computed.

    Args:
        source: The file.
        end: Position up to which it was read, in bytes.
        line: Number of the line at that position.
        crc: Checksum of the line before it.
    """
    at, number, before = 0, 1, 0
    try:
        with open_regular(source.path) as file:
            while at < end:
                block = file.read(min(end - at, _BLOCK_BYTES))
                if not block.endswith(b"\n"):
                    block += file.readline()
                lines = block.splitlines(keepends=True)
                crcs = check_each_line(lines, before)
                if len(crcs) < max(1, len(lines)):
                    return False
                if at == 0:
                    header = _read_object(lines[0])
                    if header is None:
                        return False
                    _check_header(source, header)
                at, number, before = at + len(block), number + len(lines), crcs[-1]
    except (OSError, JournalError):  # reading the file tells what is wrong with it
        return False
    return (at, number, before) == (end, line, crc)


def _read_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _make_checked_key(record: dict[str, Any]) -> RecordKey:
    """Return the key of a record, with None as index if the record must be refused."""
    facts = make_record_key(record)
    try:
        check_record(record)
    except ValueError:
        return None, *facts[1:]  # sum_records refuses the batch; check_line then names the line
    return facts


def sum_records(facts: Sequence[RecordKey], items: int) -> UsageTotals | None:
    """Return the sums over records, computed by column for speed.

    Args:
        facts: Key of each record; at least one.
        items: Number of items of the run.

    Returns:
        The sums; None if :func:`check_line` refuses one of the records.
    """
    indices, statuses, _, *columns = zip(*facts, strict=True)
    fine = (
        _INDEX.issuperset(map(type, indices))
        and min(indices) >= 0
        and max(indices) < items
        and _TEXT.issuperset(map(type, statuses))
        and _STATUS.issuperset(statuses)
    )
    sums = list[int]()
    for column in columns if fine else ():
        if not _NUMBER.issuperset(map(type, column)):
            return None
        numbers = list(filter(None, column))  # neither null nor 0
        total = sum(numbers)
        if numbers and (min(numbers) < 0 or (total > MAX_COUNT and max(numbers) > MAX_COUNT)):
            return None
        sums.append(total)
    return UsageTotals(*sums) if fine else None


def check_line(line: JournalLine, source: JournalSource, items: int) -> None:
    """Refuse a line that no journal of this run contains.

    Raises:
        JournalError: The line has other content.
    """
    record = line.record
    if (trouble := find_record_problem(record, items)) is not None:
        raise source.make_error(line.number, trouble)


def find_record_problem(record: dict[str, Any], items: int) -> str | None:
    """Return what is wrong with a record, or None.

    Args:
        record: The record.
        items: Number of items of the run.
    """
    index = record.get("index")
    if type(index) is not int:
        found = "a second header" if "v" in record else "not a record of an item"
        return f"{found}; the file was damaged or edited"
    if not 0 <= index < items:
        found = f"item {record.get('id')!r} has index {index}"
        return f"{found}, this run has {count_nouns(items, 'item')}"
    try:
        check_record(record)
    except ValueError as error:
        return str(error)
    return None
