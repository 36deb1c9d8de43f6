"""Files, lines and in-memory index of the response cache."""

from __future__ import annotations

import os
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

_PARTS: Final = 256
_FIRST: Final = 16
_EMPTY: Final = 0
_REMOVED: Final = 2**64 - 1


class KeyIndex:
    """Map keys to positions, numbers from 0 to 2^63.

    Only the first 8 bytes of a key are compared; the reader of a position compares the rest. One
    thread at a time may use the index.
    """

    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(_PARTS)]  # small parts, so that each grows quickly

    def __len__(self) -> int:
        """Return the number of keys."""
        return sum(part.live for part in self._parts)

    def find(self, key: bytes) -> int | None:
        """Return a key's position, or None."""
        part = self._parts[key[-1]]
        position = part.positions[part.slot(int.from_bytes(key[:8]))]
        return None if position in (_EMPTY, _REMOVED) else position - 1

    def put(self, key: bytes, position: int) -> None:
        """Set a key's position."""
        self._parts[key[-1]].put(int.from_bytes(key[:8]), position + 1)

    def forget(self, key: bytes) -> None:
        """Remove a key, if present."""
        self._parts[key[-1]].forget(int.from_bytes(key[:8]))


class _Part:
    """Hash table with open addressing; positions are 1 higher here, since 0 is an empty slot."""

    __slots__ = ("keys", "live", "positions", "used")

    def __init__(self, size: int = _FIRST) -> None:
        self.keys, self.positions = array("Q", [0]) * size, array("Q", [0]) * size
        self.live = self.used = 0

    def slot(self, key: int) -> int:
        """Return the slot of a key, or the slot where it belongs."""
        keys, positions = self.keys, self.positions
        mask = len(keys) - 1
        at = key & mask
        while positions[at] and keys[at] != key:
            at = (at + 1) & mask
        return at

    def put(self, key: int, position: int) -> None:
        at = self.slot(key)
        before = self.positions[at]
        self.keys[at], self.positions[at] = key, position
        self.live += before in (_EMPTY, _REMOVED)
        self.used += before == _EMPTY
        if 3 * self.used > 2 * len(self.keys):
            self._grow()

    def forget(self, key: int) -> None:
        at = self.slot(key)
        if self.positions[at] not in (_EMPTY, _REMOVED):
            self.positions[at] = _REMOVED  # not empty: later keys of the same probe chain follow
            self.live -= 1

    def _grow(self) -> None:
        grown = _Part(2 * len(self.keys) if 2 * self.live > len(self.keys) else len(self.keys))
        for key, position in zip(self.keys, self.positions, strict=True):
            if position not in (_EMPTY, _REMOVED):
                at = grown.slot(key)
                grown.keys[at], grown.positions[at] = key, position
        self.keys, self.positions, self.used = grown.keys, grown.positions, self.live


MAX_ANSWER_LINE_BYTES: Final = 1 << 26
"""Length limit of a line in bytes."""

_READ: Final = 8192


@dataclass(slots=True)
class ResponseFile:
    """A file, and how far it has been read.

    Attributes:
        path: The file.
        known_bytes: Bytes from its start that have been read, or written by this process.
        handle: Its descriptor while it is open, otherwise None.
        strange: Whether it has another kind or version and is ignored.
    """

    path: Path
    known_bytes: int = 0
    handle: int | None = None
    strange: bool = False

    def append(self, line: bytes) -> None:
        """Append a line to this process's own file.

        Raises:
            OSError: The line could not be written; a partial line has no line end and is ignored.
        """
        assert self.handle is not None, "this process's own file is open"
        done = 0
        while done < len(line):
            done += os.write(self.handle, line[done:])
        self.known_bytes += len(line)


def read_line_at(handle: int, offset: int) -> bytes:
    """Return the line at an offset; empty if it has no line end.

    Raises:
        OSError: The file cannot be read.
    """
    line, size = b"", _READ
    while True:
        piece = os.pread(handle, size, offset + len(line))
        end = piece.find(b"\n")
        if end >= 0:
            return line + piece[: end + 1]
        line, size = line + piece, 2 * size
        if not piece or len(line) > MAX_ANSWER_LINE_BYTES:
            return b""


def parse_header(line: bytes) -> Any:
    """Return the format in a file's first line, without the writer, or None."""
    try:
        header = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return {k: v for k, v in header.items() if k != "by"} if isinstance(header, dict) else None


KEY_BYTES: Final = 16

_KEY, _CRC, _ANSWER, _END = b'{"key":"', b'","crc":"', b'","answer":', b"}\n"
_HEX: Final = 2 * KEY_BYTES
_CRC_AT: Final = len(_KEY) + _HEX
_SUM_AT: Final = _CRC_AT + len(_CRC)
_ANSWER_AT: Final = _SUM_AT + 8
_TEXT_AT: Final = _ANSWER_AT + len(_ANSWER)


def format_line(key: bytes, answer: bytes) -> bytes:
    """Return the line of an answer.

    Args:
        key: Key of the request, 16 bytes.
        answer: JSON on one line.
    """
    name = key.hex().encode()
    return b"".join((_KEY, name, _CRC, _sum(name, answer), _ANSWER, answer, _END))


def parse_key(line: bytes) -> bytes | None:
    """Return the key of a line, or None if it has none; the answer is not parsed."""
    if not (line.startswith(_KEY) and line.endswith(_END) and line[_CRC_AT:_SUM_AT] == _CRC):
        return None
    try:
        return bytes.fromhex(line[len(_KEY) : _CRC_AT].decode("ascii"))
    except ValueError:
        return None


def parse_answer(line: bytes, key: bytes) -> bytes | None:
    """Return a line's answer for a key, or None if it is damaged or of another key."""
    answer = line[_TEXT_AT : -len(_END)]
    mine = parse_key(line) == key and line[_ANSWER_AT:_TEXT_AT] == _ANSWER
    if not mine or line[_SUM_AT:_ANSWER_AT] != _sum(key.hex().encode(), answer):
        return None
    return answer


def _sum(name: bytes, answer: bytes) -> bytes:
    return b"%08x" % zlib.crc32(answer, zlib.crc32(name))
