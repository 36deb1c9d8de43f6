"""Readers of csv, tsv, smi, jsonl and json files and of folders of texts; see also parquet.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from ..core.errors import InputError
from ..core.types import Row
from .lines import (
    MAX_LINE_BYTES,
    decode_line,
    open_text,
    read_lines,
    read_text_file,
    unreadable_error,
)

_BATCH_ROWS: Final = 256


TEXT_SUFFIXES: Final = (".txt", ".md")


def find_files(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, without hidden ones.

    Args:
        folder: The folder; links to other folders are not followed.

    Returns:
        Paths relative to the folder, sorted.

    Raises:
        InputError: The folder cannot be read.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder)
        found += [inside / name for name in files if not name.startswith(".")]
    return sorted(found)


def read_folder(folder: Path, files: list[Path]) -> Iterator[tuple[int, Row]]:
    """Read the text files one after the other.

    Args:
        folder: The folder.
        files: Paths relative to it.

    Yields:
        The file's position in ``files``, and a row of ``file`` (relative path) and ``text``.

    Raises:
        InputError: A file cannot be read, is empty, binary or not UTF-8.
    """
    for at, file in enumerate(files):
        yield at, {"file": file.as_posix(), "text": read_text_file(folder / file)}


def _raise_unreadable(error: OSError) -> None:
    raise unreadable_error(Path(error.filename), error) from error


_SHOWN: Final = 60


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Read a file with one JSON object per line; empty lines are skipped.

    Args:
        path: The file.

    Yields:
        The line's number (from 1), and the row.

    Raises:
        InputError: The file cannot be read or is not text, or a line is not a JSON object.
    """
    for number, raw in read_lines(path):
        if not raw or raw.isspace():
            continue
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise _invalid_json_error(path, number, raw, error) from error
        if _LONG_NUMBER.search(raw):
            _check_integers(raw, f"{path}, line {number}")
        if type(row) is not dict:
            raise InputError(
                f"{path}, line {number}: the row is not a JSON object but {_kind(row)}"
                f"{_array_hint(raw)}"
            )
        yield number, row


def read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """Read a file with one JSON array of objects; or one with an object per line.

    The array is read as a whole, of which JSON lines need only one line at a time.

    Args:
        path: The file.

    Yields:
        The position in the array, or the line's number (from 1), and the row.

    Raises:
        InputError: The file cannot be read or is no such array; names its line or the position.
    """
    if name_json_position(path) == "line":
        yield from read_jsonl(path)
        return
    content = b"\n".join(raw for _, raw in read_lines(path))
    try:
        rows = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        at = f"{path}, line {error.lineno}"
        raise InputError(f"{at}: not JSON: {error.msg} at character {error.colno}") from error
    if type(rows) is not list:
        kind = "an object" if type(rows) is dict else _kind(rows)
        msg = f"{path} is {kind}, not an array of objects: [{{…}}, …]; put the rows in an array"
        raise InputError(msg)
    if _LONG_NUMBER.search(content):
        _check_integers(content, str(path))
    for number, row in enumerate(rows, start=1):
        if type(row) is not dict:
            raise InputError(f"{path}, row {number}: not a JSON object but {_kind(row)}")
        yield number, row


def name_json_position(path: Path) -> str:
    """Return what a position in a ``.json`` file counts: a row of its array, or a line.

    Raises:
        InputError: The file cannot be read.
    """
    with open_text(path) as file:
        first = next(
            (raw for raw in iter(partial(file.readline, MAX_LINE_BYTES), b"") if raw.strip()), b""
        )
    return "line" if _is_object(first) else "row"


def _is_object(raw: bytes) -> bool:
    try:
        return type(orjson.loads(raw)) is dict
    except orjson.JSONDecodeError:
        return False


_LONG_NUMBER: Final = re.compile(rb"[0-9]{19}")
"""At least as many digits as the smallest integer of more than 64 bits."""


def _check_integers(raw: bytes, where: str) -> None:
    """Check that no integer has more than 64 bits, of which the parser would lose digits.

    Raises:
        InputError: There is one.
    """

    def check(digits: str) -> int:
        value = int(digits)
        if not -(2**63) <= value < 2**64:
            msg = (
                f"{where}: the number {digits[:_SHOWN]} has more than 64 bits and would lose "
                "digits; write it as a text, in quotes"
            )
            raise InputError(msg)
        return value

    json.loads(raw, parse_int=check)


def _invalid_json_error(
    path: Path, number: int, raw: bytes, error: orjson.JSONDecodeError
) -> InputError:
    text = decode_line(path, number, raw)
    start = max(0, error.pos - _SHOWN // 2)
    hint = "; NaN is not JSON, write null" if "NaN" in text else _array_hint(raw)
    return InputError(
        f"{path}, line {number}: the row is not JSON: {error.msg} at character {error.pos + 1}, "
        f"near {text[start : start + _SHOWN]!r}{hint}"
    )


def _array_hint(raw: bytes) -> str:
    if not raw.lstrip().startswith(b"["):
        return "; each line must be one object, {...}"
    return "; name a file with one array of objects .json"


def _kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


@dataclass(frozen=True, slots=True)
class CsvSplitter:
    """Split lines into records; a quoted cell may span several lines.

    Blanks around a quoted cell are ignored. A quote inside an unquoted cell is plain text.

    Attributes:
        path: The file, for messages.
        delimiter: ``","`` or a tab.
    """

    path: Path
    delimiter: str

    def split(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
        """Split lines into records.

        Args:
            lines: Line numbers and lines without their ends.

        Yields:
            The number of the record's first line, and its cells.

        Raises:
            InputError: A quote is not closed, or text follows a closing quote.
        """
        for number, line in lines:
            if '"' in line:
                yield number, self._split_quoted(number, line, lines)
            else:
                yield number, line.split(self.delimiter)

    def _split_quoted(self, number: int, line: str, lines: Iterator[tuple[int, str]]) -> list[str]:
        cells: list[str] = []
        at = 0
        while True:
            start = _past_blanks(line, at)
            if line.startswith('"', start):
                cell, number, line, at = self._read_quoted_cell(number, line, start + 1, lines)
                cells.append(cell)
                if at == len(line):
                    return cells
                if not line.startswith(self.delimiter, at):
                    raise InputError(
                        f"{self.path}, line {number}: text follows the closing quote of cell "
                        f"{len(cells)}; write a quote inside a quoted cell twice"
                    )
            else:
                end = line.find(self.delimiter, at)
                if end < 0:
                    return [*cells, line[at:]]
                cells.append(line[at:end])
                at = end
            at += len(self.delimiter)

    def _read_quoted_cell(
        self, number: int, line: str, at: int, lines: Iterator[tuple[int, str]]
    ) -> tuple[str, int, str, int]:
        """Read a quoted cell from after its opening quote; return the cell and where it ends."""
        parts: list[str] = []
        opened, size = number, 0
        while True:
            end = line.find('"', at)
            if end >= 0:
                if not line.startswith('"', end + 1):
                    parts.append(line[at:end])
                    return "".join(parts), number, line, _past_blanks(line, end + 1)
                parts.append(line[at : end + 1])
                at = end + 2
                continue
            parts += line[at:], "\n"
            size += len(line)
            number, line = next(lines, (0, ""))
            if not number or size > MAX_LINE_BYTES:
                raise InputError(
                    f"{self.path}, line {opened}: the quote that opens here is not closed; "
                    "write a quote inside a quoted cell twice"
                )
            at = 0


def _past_blanks(line: str, at: int) -> int:
    while line.startswith(" ", at):
        at += 1
    return at


_SMI_TITLES: Final = frozenset({"smiles", "canonical_smiles", "isomeric_smiles"})


def read_delimited(path: Path, delimiter: str, quotes: bool = True) -> Iterator[tuple[int, Row]]:
    """Read a csv or tsv file with a header.

    Blanks around cells and column names are removed; a column without a name is called
    ``unnamed_N`` by its position from 0. Blank lines are skipped.

    Args:
        path: The file.
        delimiter: ``","`` or a tab.
        quotes: Whether quotes enclose cells; else they are text.

    Yields:
        The line on which the row starts (from 1), and the row.

    Raises:
        InputError: The file cannot be read or is not text, its header is faulty, it has no rows,
            or a row has more or fewer cells than the header.
    """
    lines = _text_lines(path)
    records = (
        CsvSplitter(path, delimiter).split(lines)
        if quotes
        else ((number, line.split(delimiter)) for number, line in lines)
    )
    full = ((line, cells) for line, cells in records if len(cells) > 1 or cells[0].strip())
    line, cells = next(full, (0, []))
    if not line:
        raise InputError(f"{path} contains only blanks; its first line must name the columns")
    header = _header(path, line, cells, delimiter)
    width = len(header)
    for line, cells in full:
        if len(cells) != width:
            hint = (
                "put quotes around cells that contain the delimiter"
                if quotes
                else "if quotes enclose cells, set input.quotes: true"
            )
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, but the header names {width} columns; "
                f"{hint}"
            )
        yield line, dict(zip(header, map(str.strip, cells), strict=True))


def read_smi(path: Path) -> Iterator[tuple[int, Row]]:
    """Read a smi file: a SMILES per line, then optionally white space and a name.

    Blank lines, lines that start with ``#`` and a title line are skipped.

    Args:
        path: The file.

    Yields:
        The line's number (from 1), and a row of ``smiles`` and ``name`` (``""`` when absent).

    Raises:
        InputError: The file cannot be read or is not text.
    """
    begun = False
    for number, line in _text_lines(path):
        parts = line.split(maxsplit=1)
        if not parts or parts[0].startswith("#"):
            continue
        if begun or parts[0].lower() not in _SMI_TITLES:
            yield number, {"smiles": parts[0], "name": parts[1].strip() if parts[1:] else ""}
        begun = True


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, decode_line(path, number, raw)) for number, raw in read_lines(path))


def _header(path: Path, line: int, cells: list[str], delimiter: str) -> list[str]:
    names = [cell.strip() or f"unnamed_{at}" for at, cell in enumerate(cells)]
    if any("\r" in name for name in names):
        raise InputError(
            f"{path}, line {line}: lines end with bare carriage returns; "
            f"convert it with: tr '\\r' '\\n' < '{path}' > converted{path.suffix}"
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{path}, line {line}: the header names {', '.join(map(repr, repeated))} twice; "
            "give every column a different name"
        )
    if len(names) == 1:
        _check_delimiter(path, line, names[0], delimiter)
    return names


def _check_delimiter(path: Path, line: int, name: str, delimiter: str) -> None:
    for other, what in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        if other != delimiter and other in name:
            raise InputError(
                f"{path}, line {line}: the columns seem to be separated by {what}; a .csv file "
                "needs commas, a .tsv file needs tabs"
            )
