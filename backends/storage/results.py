"""Writers of results: Parquet, CSV, JSON lines."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import JournalError
from ..core.types import Json
from .results_schema import (
    FREE_TEXT,
    JSON,
    RESULT_COLUMNS,
    UNFIT_COLUMN,
    CellType,
    ResultRow,
    fit_column,
    make_rows,
    read_cell_type,
    to_compact_json,
)


@contextmanager
def explain_write_errors(target: str) -> Iterator[None]:
    """Convert an OSError of the block into a JournalError that names ``target``."""
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"{target}: the results cannot be written: {error.strerror or error}; "
            "the journal still contains them: free disk space or choose another path, and retry"
        ) from error


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside ``path`` that replaces it when the block succeeds.

    Raises:
        JournalError: The file cannot be written; the old one is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    with explain_write_errors(str(path)):
        partial.unlink(missing_ok=True)
        file = partial.open("xb")  # "x": never follow a link that already exists
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def get_stream_name(stream: IO[bytes]) -> str:
    """Return the name of a stream for messages."""
    name = getattr(stream, "name", None)
    return name if isinstance(name, str) else "the output stream"


BATCH_ROWS: Final = 4_096
"""Rows held in memory and written together."""

BATCH_BYTES: Final = 16 << 20
"""Size of outputs and errors at which a smaller batch is written."""

_INTEGERS: Final = (
    "attempts",
    "repairs",
    "reused",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "wasted_tokens",
)

_TYPES: Final[Mapping[str, pa.DataType]] = {
    **dict.fromkeys(RESULT_COLUMNS, pa.string()),
    **dict.fromkeys(_INTEGERS, pa.int64()),
    "usd": pa.float64(),
    "latency_s": pa.float64(),
    "finished_at": pa.timestamp("ms", tz="UTC"),
    "simulated": pa.bool_(),
}


def write_parquet(
    records: Iterable[ResultRow], path: Path, schema: Mapping[str, Json] | None
) -> int:
    """Write the results to a file, completely or not at all, in bounded memory.

    Args:
        records: Rows from :func:`make_rows`, in the order of the rows.
        path: The file to create or replace.
        schema: The task's JSON Schema, which gives ``output`` its type; None makes it text.

    Returns:
        Number of rows written.

    Raises:
        JournalError: The file cannot be written (an existing file is then unchanged), or a record
            is damaged.
    """
    shape = read_cell_type(schema)
    table = _table(shape)
    rows = 0
    with replace_file(path) as file, pq.ParquetWriter(file, table, compression="zstd") as writer:
        for batch in _batches(records):
            writer.write_batch(_columns(batch, table, shape))
            rows += len(batch)
    return rows


def _table(shape: CellType) -> pa.Schema:
    types = {**_TYPES, "output": _arrow(shape)}
    tail = {} if shape in {FREE_TEXT, JSON} else {UNFIT_COLUMN: pa.string()}
    return pa.schema({name: types[name] for name in RESULT_COLUMNS} | tail)


def _arrow(shape: CellType) -> pa.DataType:
    match shape.kind:
        case "integer":
            return pa.int64()
        case "number":
            return pa.float64()
        case "boolean":
            return pa.bool_()
        case "list":
            return pa.list_(_arrow(shape.parts[0][1]))
        case "struct":
            return pa.struct([(name, _arrow(part)) for name, part in shape.parts])
        case "free" | "json" | "text":
            return pa.string()


def _batches(records: Iterable[ResultRow]) -> Iterator[list[ResultRow]]:
    batch: list[ResultRow] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _weight(record.get("output")) + _weight(record.get("error"))
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _weight(value: Json) -> int:
    """Estimate the bytes of a cell of unbounded length."""
    if value is None:
        return 0
    return len(value if isinstance(value, str) else orjson.dumps(value))


def _columns(batch: list[ResultRow], table: pa.Schema, shape: CellType) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        name: [record.get(name) for record in batch] for name in RESULT_COLUMNS
    }
    outputs = columns["output"]
    columns["output"], unfit = fit_column(shape, outputs)
    columns[UNFIT_COLUMN] = [None] * len(batch)
    for row in unfit:
        columns[UNFIT_COLUMN][row] = to_compact_json(outputs[row])
    arrays = [
        _times(batch)
        if column.name == "finished_at"
        else pa.array(columns[column.name], column.type)
        for column in table
    ]
    return pa.record_batch(arrays, schema=table)


def _times(batch: list[ResultRow]) -> pa.Array[Any]:
    """Return the times at which items ended."""
    kind = _TYPES["finished_at"]
    texts = pa.array([record.get("finished_at") for record in batch], pa.string())
    try:
        return texts.cast(kind)
    except pa.ArrowInvalid:  # another form of ISO 8601, or a damaged record
        return pa.array([_time(record) for record in batch], kind)


def _time(record: ResultRow) -> datetime | None:
    text = record.get("finished_at")
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise JournalError(
            f"the record of item {record.get('id')!r} is damaged: finished_at is {text!r}, "
            "not a time in ISO 8601"
        ) from error


_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FOREIGN: Final = ("error", "model", "reasoning")


def write_csv(
    records: Iterable[ResultRow],
    stream: IO[bytes],
    schema: Mapping[str, Json] | None,
    *,
    safe: bool = False,
) -> int:
    """Write a header and one row per record.

    An object schema gives a column ``output.NAME`` per property, with lists and objects as JSON
    text, and a last column for outputs with further properties; otherwise there is one column
    ``output``. Null is an empty cell.

    Args:
        records: Rows from :func:`make_rows`, in the order of the rows.
        stream: Stream to write to; it stays open.
        schema: The task's JSON Schema, or None.
        safe: Whether to guard all cells and the header, not only text written by a model.

    Returns:
        Number of rows written, without the header.

    Raises:
        JournalError: The stream cannot be written.
    """
    columns, target, rows = _csv_columns(read_cell_type(schema)), get_stream_name(stream), 0
    with explain_write_errors(target):
        stream.write(_line([_guard_formula(name) for name in columns] if safe else list(columns)))
    for record in records:
        cells = [cell(record) for cell in columns.values()]
        line = _line([_guard_formula(text) for text in cells] if safe else cells)
        with explain_write_errors(target):
            stream.write(line)
        rows += 1
    with explain_write_errors(target):
        stream.flush()
    return rows


def _csv_columns(shape: CellType) -> dict[str, Callable[[ResultRow], str]]:
    """Return, by column, the function that makes a cell from a record."""
    columns: dict[str, Callable[[ResultRow], str]] = {}
    for name in RESULT_COLUMNS:
        if name == "output" and shape.kind == "struct":
            columns |= {f"output.{part}": _property(part) for part, _ in shape.parts}
        else:
            columns[name] = _plain(name, guarded=name == "output" or name in _FOREIGN)
    if shape.kind == "struct":
        columns[UNFIT_COLUMN] = _unfit(frozenset(part for part, _ in shape.parts))
    return columns


def _plain(name: str, *, guarded: bool) -> Callable[[ResultRow], str]:
    return lambda record: _cell(record.get(name), guarded=guarded)


def _property(name: str) -> Callable[[ResultRow], str]:
    def cell(record: ResultRow) -> str:
        output = record.get("output")
        return _cell(output.get(name), guarded=True) if isinstance(output, Mapping) else ""

    return cell


def _unfit(known: frozenset[str]) -> Callable[[ResultRow], str]:
    def cell(record: ResultRow) -> str:
        output = record.get("output")
        if output is None or (isinstance(output, Mapping) and output.keys() <= known):
            return ""
        return to_compact_json(output)

    return cell


def _cell(value: Json, *, guarded: bool) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return to_compact_json(value)
    return _guard_formula(value) if guarded else value


def _guard_formula(text: str) -> str:
    """Return a cell that spreadsheets do not evaluate; numbers stay numbers."""
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def _line(cells: list[str]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().encode()


def write_jsonl(records: Iterable[ResultRow], stream: IO[bytes]) -> int:
    """Write one JSON object per line, in UTF-8, with ``output`` as the model gave it.

    Args:
        records: Rows from :func:`make_rows`, in the order of the lines.
        stream: Stream to write to; it stays open.

    Returns:
        Number of lines written.

    Raises:
        JournalError: The stream cannot be written.
    """
    target = get_stream_name(stream)
    lines = 0
    for record in records:
        row = {name: record.get(name) for name in RESULT_COLUMNS}
        with explain_write_errors(target):
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        lines += 1
    with explain_write_errors(target):
        stream.flush()
    return lines


__all__ = ["RESULT_COLUMNS", "make_rows", "write_csv", "write_jsonl", "write_parquet"]
