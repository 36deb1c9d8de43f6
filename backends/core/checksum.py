"""Checksums of JSON lines: each continues that of the line before it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

CRC_FIELD: Final = b',"crc":"'
"""Beginning of a line's last key."""

CRC_END: Final = b'"}\n'
"""End of a line."""

_CHECKSUM: Final = CRC_FIELD + b"%08x" + CRC_END

CRC_TAIL_BYTES: Final = len(CRC_FIELD) + 8 + len(CRC_END)
"""Bytes at a line's end that the checksum does not cover."""

PREVIOUS_CRC_BYTES: Final = 8 + len(CRC_END)
"""Bytes before a line that hold the checksum which it continues."""


def add_crc(data: bytes, before: int) -> tuple[bytes, int]:
    """Return a JSON object as a line with its checksum, and the checksum.

    Args:
        data: The object, not empty, without blanks around it.
        before: The checksum of the line before; 0 for the first line.
    """
    data = data[:-1]
    crc = zlib.crc32(data, before)
    return data + _CHECKSUM % crc, crc


def check_crc(line: bytes, before: int) -> int | None:
    """Return the checksum of a line, or None if the line does not match it.

    Args:
        line: The line, with its end.
        before: The checksum of the line before; 0 for the first line.
    """
    crc = zlib.crc32(line[:-CRC_TAIL_BYTES], before)
    return crc if line.endswith(_CHECKSUM % crc) else None


def check_each_line(lines: Sequence[bytes], before: int) -> list[int]:
    """Return the checksums of lines that follow each other, up to one that does not match.

    Args:
        lines: The lines, with their ends.
        before: The checksum of the line before the first.
    """
    crcs, crc = list[int](), before
    for line in lines:
        crc = zlib.crc32(line[:-CRC_TAIL_BYTES], crc)
        crcs.append(crc)
    ends = b"".join([line[-CRC_TAIL_BYTES:] for line in lines])
    if ends == (_CHECKSUM * len(lines)) % tuple(crcs):
        return crcs
    crcs = []
    for line in lines:
        if (found := check_crc(line, before)) is None:
            break
        crcs.append(before := found)
    return crcs


def check_lines(lines: Sequence[bytes], before: int) -> bool:
    """Return True if the last of some lines that follow each other ends with their checksum.

    It covers the content of all lines, and is computed at once.

    Args:
        lines: The lines, with their ends; at least one.
        before: The checksum of the line before the first.
    """
    crc = zlib.crc32(b"".join([line[:-CRC_TAIL_BYTES] for line in lines]), before)
    return lines[-1].endswith(_CHECKSUM % crc)


def parse_crc(data: bytes) -> int:
    """Return the checksum of a line from its last :data:`PREVIOUS_CRC_BYTES` bytes.

    Raises:
        ValueError: The bytes are not the end of a line.
    """
    return int(data[:8], 16)
