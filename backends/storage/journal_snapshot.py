"""A journal's index on disk: sessions and commands that open a long journal parse less of it."""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.errors import JournalError
from ..core.money import UsageTotals
from ..core.values import is_count
from .journal_file import RunIds, get_current_run_id, is_own_run, open_regular

SNAPSHOT_FILE: Final = "index.bin"

_VERSION: Final = 1
_ENDS: Final = 2
"""States of an item besides those of error classes, which follow them: open and done."""
_MOST_STATES: Final = 256
_BLOCK: Final = 1 << 18
"""Items that are checked at once."""


@dataclass(frozen=True, slots=True)
class FileEnd:
    """How far a journal file was read.

    Attributes:
        name: The file.
        end: End of the last line that was read, in bytes.
        line: Number of the line after it, from 1.
        crc: Checksum of the last line.
    """

    name: str
    end: int
    line: int
    crc: int


@dataclass(frozen=True, slots=True)
class JournalSnapshot:
    """The index over a journal, at one time.

    Attributes:
        files: The journal's files, by their number.
        classes: State of the items that failed with an error class.
        duplicates: Number of records that replaced another one.
        usage: Usage by session.
        states: State of each item.
        numbers: Number of the file of each item's record.
        starts: Start of each item's record in bytes.
        lengths: Length of each item's record in bytes; 0: there is none.
    """

    files: list[FileEnd]
    classes: dict[str, int]
    duplicates: int
    usage: dict[int, UsageTotals]
    states: bytearray
    numbers: array[int]
    starts: array[int]
    lengths: array[int]


def write_snapshot(folder: Path, run: RunIds, snapshot: JournalSnapshot) -> None:
    """Write a snapshot, which replaces the one before.

    It is not flushed to disk: what a power failure leaves of it is recognized and ignored.

    Raises:
        JournalError: The file cannot be written.
    """
    columns = [memoryview(column).cast("B") for column in _get_columns(snapshot)]
    about = {
        "v": _VERSION,
        "run": get_current_run_id(run),
        "order": sys.byteorder,
        "items": len(snapshot.states),
        "files": snapshot.files,
        "classes": snapshot.classes,
        "duplicates": snapshot.duplicates,
        "usage": [[session, usage.to_dict()] for session, usage in snapshot.usage.items()],
        "crc": _compute_crc(columns),
    }
    head = orjson.dumps(about)
    path = folder / SNAPSHOT_FILE
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            file.write(b"%08x %b\n" % (zlib.crc32(head), head))
            for column in columns:
                file.write(column)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise JournalError(f"{path}: cannot be written: {error.strerror}") from error


def read_snapshot(folder: Path, run: RunIds, items: int) -> JournalSnapshot | None:
    """Return the snapshot of a run; None if there is none, or none that is whole.

    It says nothing about the journal as it is now: the caller compares the files.

    Args:
        folder: The journal's folder.
        run: The run's ids.
        items: Number of items of the run.
    """
    try:
        with open_regular(folder / SNAPSHOT_FILE) as file:
            crc, _, head = file.readline().rstrip(b"\n").partition(b" ")
            if crc != b"%08x" % zlib.crc32(head):
                return None
            about: dict[str, Any] = orjson.loads(head)
            is_ours = is_own_run(about["run"], run) and about["order"] == sys.byteorder
            if about["v"] != _VERSION or not is_ours or about["items"] != items:
                return None
            found = JournalSnapshot(
                files=[FileEnd(**one) for one in about["files"]],
                classes=about["classes"],
                duplicates=about["duplicates"],
                usage={session: UsageTotals(**usage) for session, usage in about["usage"]},
                states=bytearray(items),
                numbers=array("i", [0]) * items,
                starts=array("q", [0]) * items,
                lengths=array("i", [0]) * items,
            )
            columns = [memoryview(column).cast("B") for column in _get_columns(found)]
            is_whole = all(file.readinto(column) == len(column) for column in columns)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not is_whole or _compute_crc(columns) != about["crc"] or not _is_in_range(found):
        return None
    return found


def _is_in_range(found: JournalSnapshot) -> bool:
    """Return True if no value leads out of the journal; the checksums do not say who wrote them."""
    counts = [found.duplicates, *(n for one in found.files for n in (one.end, one.line, one.crc))]
    counts += [n for session, usage in found.usage.items() for n in (session, *astuple(usage))]
    if not isinstance(found.classes, dict):
        return False
    codes = range(_ENDS, _ENDS + len(found.classes))
    return (
        all(map(is_count, counts))
        and all(isinstance(one.name, str) for one in found.files)
        and list(found.classes.values()) == list(codes)
        and codes.stop <= _MOST_STATES
        and not found.states.translate(None, bytes(range(codes.stop)))
        and _are_records_in_files(found)
    )


def _are_records_in_files(found: JournalSnapshot) -> bool:
    import numpy as np  # noqa: PLC0415 - takes 0.1 s, and only long journals have a saved index

    ends = np.array([one.end for one in found.files], np.int64)
    kinds = (np.uint8, np.intc, np.int64, np.intc)
    columns = [
        np.frombuffer(column, kind) for column, kind in zip(_get_columns(found), kinds, strict=True)
    ]
    for lo in range(0, len(found.states), _BLOCK):
        states, numbers, starts, lengths = (column[lo : lo + _BLOCK] for column in columns)
        has_record = lengths != 0
        if (states > 0)[~has_record].any():
            return False
        numbers, starts, lengths = (one[has_record] for one in (numbers, starts, lengths))
        if not len(numbers):
            continue
        if numbers.min() < 0 or numbers.max() >= len(ends):
            return False
        if min(starts.min(), lengths.min()) < 0 or (starts > ends[numbers] - lengths).any():
            return False
    return True


def _get_columns(snapshot: JournalSnapshot) -> Sequence[bytearray | array[int]]:
    return snapshot.states, snapshot.numbers, snapshot.starts, snapshot.lengths


def _compute_crc(columns: Sequence[memoryview]) -> int:
    crc = 0
    for column in columns:
        crc = zlib.crc32(column, crc)
    return crc
