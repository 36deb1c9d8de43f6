"""Text files, read line by line with checks for encoding, size and binary content."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from ..core.errors import InputError

MAX_LINE_BYTES: Final = 64 * 2**20
"""Longest line and longest text accepted; reading stops here in files without line ends."""

_SNIFF_BYTES: Final = 8192
_UTF8_BOM: Final = b"\xef\xbb\xbf"
_UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, after a UTF-8 byte order mark if there is one; unpack ``.gz``.

    Raises:
        InputError: The file cannot be read or unpacked, or is empty, binary or UTF-16.
    """
    try:
        with _open(path) as file:
            head = file.read(_SNIFF_BYTES)
            _check_head(path, head)
            file.seek(len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        msg = f"{path} cannot be unpacked: {error}; pack it again with gzip, or rename it"
        raise InputError(msg) from error
    except OSError as error:
        raise unreadable_error(path, error) from error


def is_gzip(path: Path) -> bool:
    """Return True if a file is packed with gzip, by its name."""
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")


def unreadable_error(path: Path, error: OSError) -> InputError:
    """Return the error for a file that cannot be opened or read."""
    reason = error.strerror or str(error)
    return InputError(f"{path} cannot be read: {reason}; check input.path and its permissions")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read a text file line by line.

    Args:
        path: The file.

    Yields:
        Line numbers from 1, and lines without their ends, undecoded.

    Raises:
        InputError: The file cannot be read, is empty, binary or UTF-16, or has too long a line.
    """
    with open_text(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if b"\0" in raw:
                raise _binary(path, f"a NUL byte in line {number}")
            if len(raw) > MAX_LINE_BYTES:
                raise InputError(
                    f"{path}, line {number} is longer than {MAX_LINE_BYTES} bytes; "
                    "the file must be text with one row per line"
                )
            yield number, raw.rstrip(b"\r\n")


def decode_line(path: Path, number: int, raw: bytes) -> str:
    """Decode one line of UTF-8.

    Args:
        path: The file, for the message.
        number: The line's number, from 1.
        raw: The line.

    Raises:
        InputError: The line is not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of line {number} is 0x{raw[error.start]:02X}"
        raise _encoding(path, byte, "ISO-8859-1") from error


def read_text_file(path: Path) -> str:
    """Read a whole text file; its lines end with a line feed.

    Args:
        path: The file, of at most 64 MiB.

    Raises:
        InputError: The file cannot be read, is empty, too large, binary or not UTF-8.
    """
    if not is_gzip(path) and (size := _file_size(path)) > MAX_LINE_BYTES:
        raise _too_large(path, f"{size} bytes")
    lines, length = list[str](), 0
    for number, raw in read_lines(path):
        length += len(raw) + 1
        if length > MAX_LINE_BYTES + 1:
            raise _too_large(path, f"more than {MAX_LINE_BYTES} bytes unpacked")
        lines.append(decode_line(path, number, raw))
    text = "\n".join(lines)
    if not text.strip():
        raise InputError(f"{path} contains only blanks; remove it from the folder, or fill it")
    return text


def _file_size(path: Path) -> int:
    with open_text(path) as file:
        return os.fstat(file.fileno()).st_size


def _too_large(path: Path, size: str) -> InputError:
    msg = f"{path} has {size}; an item may have at most {MAX_LINE_BYTES}: split the file"
    return InputError(msg)


def _check_head(path: Path, head: bytes) -> None:
    if not head.removeprefix(_UTF8_BOM):
        raise InputError(f"{path} is empty; input.path must name a file with rows")
    if head.startswith(_UTF16_BOMS):
        raise _encoding(path, "it starts with the byte order mark of UTF-16", "UTF-16")
    if b"\0" in head:
        raise _binary(path, f"a NUL byte at offset {head.index(0)}")


def _binary(path: Path, sign: str) -> InputError:
    return InputError(
        f"{path} is a binary file ({sign}), not text; unpack it first if it is compressed; "
        "name it .parquet if it is Parquet, or .gz if gzip has packed it"
    )


def _encoding(path: Path, sign: str, encoding: str) -> InputError:
    return InputError(
        f"{path} is not encoded as UTF-8: {sign}; "
        f"convert it with: iconv -f {encoding} -t UTF-8 '{path}' > converted{path.suffix}"
    )
