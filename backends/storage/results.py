"""Results as a Parquet file with typed columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import LedgerError
from ..core.types import Json
from .columns import RESULT_COLUMNS, UNFIT, Record, json_text
from .fitting import fit_all
from .guard import replacing
from .results_schema import FREE, JSON, Shape, shape_of

ROWS: Final = 4_096
"""Rows held in memory and written together."""

BYTES: Final = 16 << 20
"""Fewer rows are written together once their outputs and errors are this long."""

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


def write_parquet(records: Iterable[Record], path: Path, schema: Mapping[str, Json] | None) -> int:
    """Write the results to a file, whole or not at all, in memory that does not grow with them.

    Args:
        records: Rows, see :func:`rows`, in the order of the rows.
        path: The file to make or replace.
        schema: The task's JSON Schema, which gives ``output`` its type; None makes it text.

    Returns:
        Rows written.

    Raises:
        LedgerError: The file cannot be written (an older one is then untouched), or a record is
            damaged.
    """
    shape = shape_of(schema)
    table = _table(shape)
    rows = 0
    with replacing(path) as file, pq.ParquetWriter(file, table, compression="zstd") as writer:
        for batch in _batches(records):
            writer.write_batch(_columns(batch, table, shape))
            rows += len(batch)
    return rows


def _table(shape: Shape) -> pa.Schema:
    types = {**_TYPES, "output": _arrow(shape)}
    tail = {} if shape in {FREE, JSON} else {UNFIT: pa.string()}
    return pa.schema({name: types[name] for name in RESULT_COLUMNS} | tail)


def _arrow(shape: Shape) -> pa.DataType:
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


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _weight(record.get("output")) + _weight(record.get("error"))
        if len(batch) == ROWS or size >= BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _weight(value: Json) -> int:
    """Return about how many bytes a cell takes whose length nothing bounds."""
    if value is None:
        return 0
    return len(value if isinstance(value, str) else orjson.dumps(value))


def _columns(batch: list[Record], table: pa.Schema, shape: Shape) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        name: [record.get(name) for record in batch] for name in RESULT_COLUMNS
    }
    outputs = columns["output"]
    columns["output"], unfit = fit_all(shape, outputs)
    columns[UNFIT] = [None] * len(batch)
    for row in unfit:
        columns[UNFIT][row] = json_text(outputs[row])
    arrays = [
        _times(batch)
        if column.name == "finished_at"
        else pa.array(columns[column.name], column.type)
        for column in table
    ]
    return pa.record_batch(arrays, schema=table)


def _times(batch: list[Record]) -> pa.Array[Any]:
    """Return the times at which items ended."""
    kind = _TYPES["finished_at"]
    texts = pa.array([record.get("finished_at") for record in batch], pa.string())
    try:
        return texts.cast(kind)
    except pa.ArrowInvalid:  # another way to write ISO 8601, or a damaged record
        return pa.array([_time(record) for record in batch], kind)


def _time(record: Record) -> datetime | None:
    text = record.get("finished_at")
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise LedgerError(
            f"the record of item {record.get('id')!r} is damaged: finished_at is {text!r}, "
            "not a time in ISO 8601"
        ) from error
