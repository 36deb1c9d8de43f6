"""Results as comma-separated values (RFC 4180, UTF-8).

Spreadsheets run text that begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return as a
formula, and a model can be talked into writing such text. In the columns that hold what a model
or an endpoint said (the output, ``error`` and ``model``) it gets an apostrophe in front, as
OWASP advises on CSV injection. Numbers stay as they are. ``id`` and the names of columns are the
user's own and stay too, unless a file is to be safe as a whole (``--safe-csv``). The other formats
hold the text unchanged.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Final

from ..core.types import Json
from .columns import RESULT_COLUMNS, UNFIT, Record, json_text
from .guard import name_of, refusals
from .results_schema import Shape, shape_of

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FOREIGN: Final = ("error", "model")


def write_csv(
    records: Iterable[Record],
    stream: IO[bytes],
    schema: Mapping[str, Json] | None,
    *,
    safe: bool = False,
) -> int:
    """Write a header and one row per record.

    A schema of an object gives a column ``output.NAME`` per property, with lists and objects as
    JSON text, and a last column for outputs that have more; else there is one column ``output``.
    Null is an empty cell.

    Args:
        records: Rows, see :func:`rows`, in the order of the rows.
        stream: Where to write; it stays open.
        schema: The task's JSON Schema, or None.
        safe: Whether to guard all cells and the header, and not only what a model has written.

    Returns:
        Rows written, without the header.

    Raises:
        LedgerError: The stream cannot be written.
    """
    columns, target, rows = _columns(shape_of(schema)), name_of(stream), 0
    with refusals(target):
        stream.write(_line([_guarded(name) for name in columns] if safe else list(columns)))
    for record in records:
        cells = [cell(record) for cell in columns.values()]
        line = _line([_guarded(text) for text in cells] if safe else cells)
        with refusals(target):
            stream.write(line)
        rows += 1
    with refusals(target):
        stream.flush()
    return rows


def _columns(shape: Shape) -> dict[str, Callable[[Record], str]]:
    """Return how to make each column's cell from a record."""
    columns: dict[str, Callable[[Record], str]] = {}
    for name in RESULT_COLUMNS:
        if name == "output" and shape.kind == "struct":
            columns |= {f"output.{part}": _property(part) for part, _ in shape.parts}
        else:
            columns[name] = _plain(name, guarded=name == "output" or name in _FOREIGN)
    if shape.kind == "struct":
        columns[UNFIT] = _unfit(frozenset(part for part, _ in shape.parts))
    return columns


def _plain(name: str, *, guarded: bool) -> Callable[[Record], str]:
    return lambda record: _cell(record.get(name), guarded=guarded)


def _property(name: str) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        output = record.get("output")
        return _cell(output.get(name), guarded=True) if isinstance(output, Mapping) else ""

    return cell


def _unfit(known: frozenset[str]) -> Callable[[Record], str]:
    def cell(record: Record) -> str:
        output = record.get("output")
        if output is None or (isinstance(output, Mapping) and output.keys() <= known):
            return ""
        return json_text(output)

    return cell


def _cell(value: Json, *, guarded: bool) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return json_text(value)
    return _guarded(value) if guarded else value


def _guarded(text: str) -> str:
    """Return a cell that no spreadsheet runs; numbers stay numbers."""
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def _line(cells: list[str]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().encode()
