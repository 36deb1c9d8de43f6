"""Writers of results: Parquet, CSV, JSON lines; and the layout that they share."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

import orjson
import pyarrow as pa

from ..core.arrow_columns import make_column
from ..core.arrow_text import is_read_as_text, parse_texts
from ..core.errors import JournalError
from ..core.types import Json
from .results_schema import (
    FREE_TEXT,
    INPUT_ROW,
    JSON,
    RESULT_COLUMNS,
    ROW_BYTES,
    UNFIT_COLUMN,
    CellType,
    ResultRow,
    fit_column,
    make_rows,
    name_input_columns,
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


RESULTS_VERSION: Final = "2"
VERSION_KEY: Final = b"fanfold.results"
_INPUTS_KEY: Final = b"fanfold.inputs"
"""Metadata of the table: its version, and the names that the input has for its columns."""

BATCH_ROWS: Final = 1_024
"""Rows held in memory as Python objects."""

GROUP_ROWS: Final = 4_096
"""Rows of a row group in Parquet, which are held as Arrow columns."""

BATCH_BYTES: Final = 16 << 20
"""Size of texts, as JSON, at which a smaller batch is written."""

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
    "prompt": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "raw": pa.string(),
}

_LONG: Final = ("output", "error", "reasoning", "raw", "prompt")
"""Columns of unbounded length."""


@dataclass(frozen=True, slots=True)
class InputColumn:
    """A column of the input in the results.

    Attributes:
        source: Its name in the input.
        name: Its name in the results.
        type: Its type.
    """

    source: str
    name: str
    type: pa.DataType


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """The columns of the results of a run.

    Attributes:
        output: Type of the answers.
        inputs: Columns of the input.
        optional: Names of optional columns.
        further: Columns after the answer that only results with samples have, with their types.
    """

    output: CellType
    inputs: tuple[InputColumn, ...] = ()
    optional: tuple[str, ...] = ()
    further: Mapping[str, CellType] = field(default_factory=dict)

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the columns before those of the input."""
        return RESULT_COLUMNS[:_INPUTS_AT]

    @property
    def tail(self) -> tuple[str, ...]:
        """Names of the columns after those of the input, without that of unfit answers."""
        first, *others = RESULT_COLUMNS[_INPUTS_AT:]
        return (first, *self.further, *others, *self.optional)

    def input_names(self) -> dict[str, str]:
        """Return the names of the input's columns in the results."""
        return {column.source: column.name for column in self.inputs}

    def to_arrow(self) -> pa.Schema:
        """Return the schema of the table."""
        types = {**_TYPES, "output": _arrow(self.output)}
        types |= {name: _arrow(shape) for name, shape in self.further.items()}
        last = {} if self.output in {FREE_TEXT, JSON} else {UNFIT_COLUMN: pa.string()}
        return pa.schema(
            {name: types[name] for name in self.head}
            | {column.name: column.type for column in self.inputs}
            | {name: types[name] for name in self.tail}
            | last,
            metadata={
                VERSION_KEY: RESULTS_VERSION.encode(),
                _INPUTS_KEY: orjson.dumps(self.input_names()),
            },
        )


_INPUTS_AT: Final = RESULT_COLUMNS.index("output")


def make_layout(
    schema: Mapping[str, Json] | None,
    inputs: pa.Schema | None = None,
    id_column: str | None = None,
    optional: Sequence[str] = (),
    further: Mapping[str, CellType] | None = None,
) -> ResultLayout:
    """Return the columns of the results.

    Args:
        schema: The task's JSON Schema, which gives ``output`` its type; None makes it text.
        inputs: The columns of the input with their types.
        id_column: Column of the input whose texts are the ids, or None.
        optional: Names of optional columns.
        further: Columns that only results with samples have.
    """
    further = further or {}
    inputs = pa.schema([]) if inputs is None else inputs
    columns = tuple(
        InputColumn(source, name, inputs.field(source).type)
        for source, name in name_input_columns(inputs.names, id_column, tuple(further)).items()
    )
    return ResultLayout(read_cell_type(schema), columns, tuple(optional), further)


def read_input_names(schema: pa.Schema) -> dict[str, str]:
    """Return the names of the input's columns in a table of results, by their own names."""
    names: dict[str, str] = orjson.loads((schema.metadata or {})[_INPUTS_KEY])
    return names


def write_parquet(records: Iterable[ResultRow], path: Path, layout: ResultLayout) -> int:
    """Write the results to a file, completely or not at all, in bounded memory.

    Args:
        records: Rows from :func:`make_rows`, in the order of the rows.
        path: The file to create or replace.
        layout: The columns.

    Returns:
        Number of rows written.

    Raises:
        JournalError: The file cannot be written (an existing file is then unchanged), or a record
            is damaged.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 - few commands write results

    schema, rows = layout.to_arrow(), 0
    with replace_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _group_batches(iter_batches(records, layout)):
            writer.write_table(pa.Table.from_batches(group), row_group_size=GROUP_ROWS)
            rows += sum(batch.num_rows for batch in group)
    return rows


def _group_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Yield the batches of one row group after the other."""
    group, rows, size = list[pa.RecordBatch](), 0, 0
    for batch in batches:
        group.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows > GROUP_ROWS - BATCH_ROWS or size >= BATCH_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def iter_batches(records: Iterable[ResultRow], layout: ResultLayout) -> Iterator[pa.RecordBatch]:
    """Yield the table in parts of bounded size.

    Args:
        records: Rows from :func:`make_rows`, in the order of the rows.
        layout: The columns.

    Raises:
        JournalError: A record is damaged.
    """
    schema = layout.to_arrow()
    for batch in _batches(records):
        yield _columns(batch, schema, layout)


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
        case "any":
            raise TypeError("answers have no cells of any type")


def _batches(records: Iterable[ResultRow]) -> Iterator[list[ResultRow]]:
    batch: list[ResultRow] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.get(ROW_BYTES, 0) + sum(_weight(record.get(name)) for name in _LONG)
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


_PROMPT: Final = CellType(
    "list",
    (("element", CellType("struct", (("role", FREE_TEXT), ("content", FREE_TEXT)))),),
)


def _columns(batch: list[ResultRow], table: pa.Schema, layout: ResultLayout) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        name: [record.get(name) for record in batch] for name in (*layout.head, *layout.tail)
    }
    outputs = columns["output"]
    columns["output"], unfit = fit_column(layout.output, outputs)
    columns[UNFIT_COLUMN] = [None] * len(batch)
    for row in unfit:
        columns[UNFIT_COLUMN][row] = to_compact_json(outputs[row])
    for name, shape in layout.further.items():
        columns[name], _ = fit_column(shape, columns[name])
    if "prompt" in columns:
        columns["prompt"], _ = fit_column(_PROMPT, columns["prompt"])
    inputs = [record.get(INPUT_ROW) or {} for record in batch]
    arrays = {column.name: _input_array(inputs, column) for column in layout.inputs}
    arrays["finished_at"] = _times(batch)
    return pa.record_batch(
        [
            arrays[field.name]
            if field.name in arrays
            else make_column(columns[field.name], field.type)
            for field in table
        ],
        schema=table,
    )


def _input_array(rows: Sequence[Mapping[str, Json]], column: InputColumn) -> pa.Array[Any]:
    values = [row.get(column.source) for row in rows]
    if is_read_as_text(column.type):
        return parse_texts(values, column.type)
    cells, _ = fit_column(_cell_type(column.type), values)
    return make_column(cells, column.type)


def _cell_type(kind: pa.DataType) -> CellType:
    """Return the cell type of a column of the input; texts also hold values of several types."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return FREE_TEXT
    if pa.types.is_struct(kind):
        return CellType("struct", tuple((field.name, _cell_type(field.type)) for field in kind))
    if pa.types.is_nested(kind):
        return CellType("list", (("element", _cell_type(kind.field(0).type)),))
    return CellType("any")


def _times(batch: list[ResultRow]) -> pa.Array[Any]:
    """Return the times at which items ended."""
    kind = _TYPES["finished_at"]
    texts = make_column([record.get("finished_at") for record in batch], pa.string())
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
_FOREIGN: Final = ("error", "model", "raw", "reasoning")


def write_csv(
    records: Iterable[ResultRow],
    stream: IO[bytes],
    layout: ResultLayout,
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
        layout: The columns.
        safe: Whether to guard all cells and the header, not only text written by a model.

    Returns:
        Number of rows written, without the header.

    Raises:
        JournalError: The stream cannot be written.
    """
    columns, target, rows = _csv_columns(layout), get_stream_name(stream), 0
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


def _csv_columns(layout: ResultLayout) -> dict[str, Callable[[ResultRow], str]]:
    """Return, by column, the function that makes a cell from a record."""
    shape, shapes = layout.output, {"output": layout.output, **layout.further}
    columns: dict[str, Callable[[ResultRow], str]] = {
        name: _plain(name, guarded=False) for name in layout.head
    }
    columns |= {column.name: _input(column.source) for column in layout.inputs}
    for name in layout.tail:
        if name in shapes and shapes[name].kind == "struct":
            columns |= {f"{name}.{part}": _property(name, part) for part, _ in shapes[name].parts}
        else:
            columns[name] = _plain(name, guarded=name == "output" or name in _FOREIGN)
    if shape.kind == "struct":
        columns[UNFIT_COLUMN] = _unfit(frozenset(part for part, _ in shape.parts))
    return columns


def _plain(name: str, *, guarded: bool) -> Callable[[ResultRow], str]:
    return lambda record: _cell(record.get(name), guarded=guarded)


def _input(name: str) -> Callable[[ResultRow], str]:
    return lambda record: _cell((record.get(INPUT_ROW) or {}).get(name), guarded=False)


def _property(column: str, name: str) -> Callable[[ResultRow], str]:
    def cell(record: ResultRow) -> str:
        value = record.get(column)
        return _cell(value.get(name), guarded=True) if isinstance(value, Mapping) else ""

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


def write_jsonl(records: Iterable[ResultRow], stream: IO[bytes], layout: ResultLayout) -> int:
    """Write one JSON object per line, in UTF-8, with ``output`` as the model gave it.

    A line has the columns of the input that its item has.

    Args:
        records: Rows from :func:`make_rows`, in the order of the lines.
        stream: Stream to write to; it stays open.
        layout: The columns.

    Returns:
        Number of lines written.

    Raises:
        JournalError: The stream cannot be written.
    """
    target, lines = get_stream_name(stream), 0
    for row in iter_json_rows(records, layout):
        with explain_write_errors(target):
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        lines += 1
    with explain_write_errors(target):
        stream.flush()
    return lines


def iter_json_rows(records: Iterable[ResultRow], layout: ResultLayout) -> Iterator[dict[str, Json]]:
    """Yield the rows as lines of JSON have them: with the columns that their items have.

    Args:
        records: Rows from :func:`make_rows`.
        layout: The columns.
    """
    head, names, tail = layout.head, layout.input_names(), layout.tail
    for record in records:
        row = {name: record.get(name) for name in head}
        for source, value in (record.get(INPUT_ROW) or {}).items():
            if source in names:
                row[names[source]] = value
        yield row | {name: record.get(name) for name in tail}


__all__ = [
    "RESULT_COLUMNS",
    "ResultLayout",
    "iter_batches",
    "iter_json_rows",
    "make_layout",
    "make_rows",
    "write_csv",
    "write_jsonl",
    "write_parquet",
]
