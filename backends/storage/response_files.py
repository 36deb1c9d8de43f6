"""Its files, lines and in-memory index."""

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
    """Maps keys to places, numbers from 0 to 2^63.

    It compares the first 8 bytes of a key: whoever reads what lies at a place compares the rest.
    One thread at a time may use it.
    """

    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(_PARTS)]  # small ones, so that none grows for long

    def __len__(self) -> int:
        """Return how many keys it holds."""
        return sum(part.live for part in self._parts)

    def find(self, key: bytes) -> int | None:
        """Return a key's place, or None."""
        part = self._parts[key[-1]]
        place = part.places[part.slot(int.from_bytes(key[:8]))]
        return None if place in (_EMPTY, _REMOVED) else place - 1

    def put(self, key: bytes, place: int) -> None:
        """Set a key's place."""
        self._parts[key[-1]].put(int.from_bytes(key[:8]), place + 1)

    def forget(self, key: bytes) -> None:
        """Take a key out, if it is there."""
        self._parts[key[-1]].forget(int.from_bytes(key[:8]))


class _Part:
    """A hash table with open addressing; places are 1 higher here, for 0 is an empty slot."""

    __slots__ = ("keys", "live", "places", "used")

    def __init__(self, size: int = _FIRST) -> None:
        self.keys, self.places = array("Q", bytes(8 * size)), array("Q", bytes(8 * size))
        self.live = self.used = 0

    def slot(self, key: int) -> int:
        """Return where a key is, or where it belongs."""
        keys, places = self.keys, self.places
        mask = len(keys) - 1
        at = key & mask
        while places[at] and keys[at] != key:
            at = (at + 1) & mask
        return at

    def put(self, key: int, place: int) -> None:
        at = self.slot(key)
        before = self.places[at]
        self.keys[at], self.places[at] = key, place
        self.live += before in (_EMPTY, _REMOVED)
        self.used += before == _EMPTY
        if 3 * self.used > 2 * len(self.keys):
            self._grow()

    def forget(self, key: int) -> None:
        at = self.slot(key)
        if self.places[at] not in (_EMPTY, _REMOVED):
            self.places[at] = _REMOVED  # not empty: keys that were met by it lie behind
            self.live -= 1

    def _grow(self) -> None:
        grown = _Part(2 * len(self.keys) if 2 * self.live > len(self.keys) else len(self.keys))
        for key, place in zip(self.keys, self.places, strict=True):
            if place not in (_EMPTY, _REMOVED):
                at = grown.slot(key)
                grown.keys[at], grown.places[at] = key, place
        self.keys, self.places, self.used = grown.keys, grown.places, self.live


MAX_ANSWER_LINE_BYTES: Final = 1 << 26
"""Bytes of the longest line."""

_READ: Final = 8192


@dataclass(slots=True)
class ResponseFile:
    """A file, and how far it is known.

    Attributes:
        path: Where it is.
        known_bytes: Bytes from its beginning that have been read, or written by us.
        handle: Its descriptor while it is open, else None.
        strange: Whether it is of another kind or version, and left alone.
    """

    path: Path
    known_bytes: int = 0
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
        self.known_bytes += len(line)


def read_line_at(handle: int, offset: int) -> bytes:
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
        if not piece or len(line) > MAX_ANSWER_LINE_BYTES:
            return b""


def parse_header(line: bytes) -> Any:
    """Return what a file's first line says of its form, or None; not who wrote it."""
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
        key: Of the request, 16 bytes.
        answer: JSON on one line.
    """
    name = key.hex().encode()
    return b"".join((_KEY, name, _CRC, _sum(name, answer), _ANSWER, answer, _END))


def parse_key(line: bytes) -> bytes | None:
    """Return the key of a line, or None when it is none; the answer is not looked at."""
    if not (line.startswith(_KEY) and line.endswith(_END) and line[_CRC_AT:_SUM_AT] == _CRC):
        return None
    try:
        return bytes.fromhex(line[len(_KEY) : _CRC_AT].decode("ascii"))
    except ValueError:
        return None


def parse_answer(line: bytes, key: bytes) -> bytes | None:
    """Return the answer that a line holds for a key, or None when it is another's or damaged."""
    answer = line[_TEXT_AT : -len(_END)]
    mine = parse_key(line) == key and line[_ANSWER_AT:_TEXT_AT] == _ANSWER
    if not mine or line[_SUM_AT:_ANSWER_AT] != _sum(key.hex().encode(), answer):
        return None
    return answer


def _sum(name: bytes, answer: bytes) -> bytes:
    return b"%08x" % zlib.crc32(answer, zlib.crc32(name))
