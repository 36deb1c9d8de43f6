"""One file of answers, which one process appends to and any may read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

LONGEST: Final = 1 << 26
"""Bytes of the longest line."""

_READ: Final = 8192


@dataclass(slots=True)
class AnswerFile:
    """A file, and how far it is known.

    Attributes:
        path: Where it is.
        read: Bytes from its beginning that have been read, or written by us.
        handle: Its descriptor while it is open, else None.
        strange: Whether it is of another kind or version, and left alone.
    """

    path: Path
    read: int = 0
    handle: int | None = None
    strange: bool = False

    def append(self, line: bytes) -> None:
        """Write a line at the end of one's own file.

        Raises:
            OSError: It could not be written; what was written of it has no end, and does not count.
        """
        assert self.handle is not None, "one's own file is open"
        done = 0
        while done < len(line):
            done += os.write(self.handle, line[done:])
        self.read += len(line)


def line_at(handle: int, offset: int) -> bytes:
    """Return the line that begins at an offset; empty when it has no end.

    Raises:
        OSError: It cannot be read.
    """
    line, size = b"", _READ
    while True:
        piece = os.pread(handle, size, offset + len(line))
        end = piece.find(b"\n")
        if end >= 0:
            return line + piece[: end + 1]
        line, size = line + piece, 2 * size
        if not piece or len(line) > LONGEST:
            return b""


def header_of(line: bytes) -> Any:
    """Return what a file's first line says of its form, or None; not who wrote it."""
    try:
        header = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return {k: v for k, v in header.items() if k != "by"} if isinstance(header, dict) else None
