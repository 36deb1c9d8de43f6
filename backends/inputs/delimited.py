"""Rows of csv, tsv and smi files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..core.errors import InputError
from ..core.types import Row
from .lines import decode, numbered
from .quoting import Splitter

_SMI_TITLES: Final = frozenset({"smiles", "canonical_smiles", "isomeric_smiles"})


def read_delimited(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Read a csv or tsv file with a header.

    Cells and names of columns are text without surrounding blanks; a column without a name is
    called ``unnamed_N`` by its position from 0. Blank lines are skipped.

    Args:
        path: The file.
        delimiter: ``","`` or a tab.

    Yields:
        The line on which the row begins (from 1), and the row.

    Raises:
        InputError: The file cannot be read or is no text, its header is faulty or without rows,
            or a row has more or fewer cells than the header.
    """
    records = Splitter(path, delimiter).records(_text_lines(path))
    full = ((line, cells) for line, cells in records if len(cells) > 1 or cells[0].strip())
    line, cells = next(full, (0, []))
    if not line:
        raise InputError(f"{path} holds nothing but blanks; its first line must name the columns")
    header = _header(path, line, cells, delimiter)
    width = len(header)
    for line, cells in full:
        if len(cells) != width:
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, but the header names {width} columns; "
                "put quotes around cells that contain the delimiter"
            )
        yield line, dict(zip(header, map(str.strip, cells), strict=True))


def read_smi(path: Path) -> Iterator[tuple[int, Row]]:
    """Read a smi file: on each line a SMILES, then optionally a name after white space.

    Blank lines, lines that begin with ``#`` and a title line are skipped.

    Args:
        path: The file.

    Yields:
        The line's number (from 1), and a row of ``smiles`` and ``name`` (``""`` when absent).

    Raises:
        InputError: The file cannot be read or is no text.
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
    return ((number, decode(path, number, raw)) for number, raw in numbered(path))


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
            "give every column a name of its own"
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
