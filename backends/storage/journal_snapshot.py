"""A journal's index on disk: sessions and commands that open a long journal parse less of it."""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from ..core.errors import JournalError
from ..core.money import UsageTotals
from .journal_file import RunIds, get_current_run_id, is_own_run, open_regular

SNAPSHOT_FILE: Final = "index.bin"

_VERSION: Final = 1


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
    return found if is_whole and _compute_crc(columns) == about["crc"] else None


def _get_columns(snapshot: JournalSnapshot) -> Sequence[bytearray | array[int]]:
    return snapshot.states, snapshot.numbers, snapshot.starts, snapshot.lengths


def _compute_crc(columns: Sequence[memoryview]) -> int:
    crc = 0
    for column in columns:
        crc = zlib.crc32(column, crc)
    return crc
