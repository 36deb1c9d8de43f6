"""Journal files as tests write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from fanfold.backends.core.checksum import add_crc
from fanfold.backends.storage.journal_file import make_header


def chained(*lines: bytes) -> list[bytes]:
    """Return JSON objects as lines, each with its checksum."""
    crc, found = 0, list[bytes]()
    for line in lines:
        whole, crc = add_crc(line, crc)
        found.append(whole)
    return found


def journal_lines(
    path: Path, records: Iterable[Mapping[str, Any]], run: str = "r", kind: str = "journal"
) -> list[bytes]:
    """Return the lines of a file, the header first."""
    header = make_header(path, kind, {"run": run, "session": "x"})
    return chained(header, *(orjson.dumps(record) for record in records))


def write_journal(
    path: Path, records: Iterable[Mapping[str, Any]], run: str = "r", kind: str = "journal"
) -> Path:
    """Write a file; return its path."""
    path.write_bytes(b"".join(journal_lines(path, records, run, kind)))
    return path


def edit_journal(path: Path, old: str, new: str) -> None:
    """Replace the first ``old`` in a file's text, and renew the checksums."""
    tail = len(b',"crc":"00000000"}')
    text = path.read_text().replace(old, new, 1)
    bodies = [line.encode()[:-tail] + b"}" for line in text.splitlines()]
    path.write_bytes(b"".join(chained(*bodies)))
