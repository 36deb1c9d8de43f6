"""Reader for Parquet files; apart from the other readers because pyarrow is slow to import."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.arrow_text import is_read_as_text
from ..core.errors import InputError
from ..core.fields import split_column
from ..core.types import Json, Row
from .lines import unreadable_error
from .readers import _BATCH_ROWS

_AS_THEY_ARE: Final[tuple[Callable[[pa.DataType], bool], ...]] = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
)


def read_parquet(path: Path, needed: Collection[str]) -> Iterator[tuple[int, Row]]:
    """Read a Parquet file.

    Timestamps, dates, times and decimals become text, half floats become numbers, NaN and
    infinities become null. Columns without a JSON form (bytes, durations, such types inside lists
    or structs) are left out.

    Args:
        path: The file.
        needed: Columns, or fields inside columns, that must not be left out.

    Yields:
        The row's number (from 1), and the row.

    Raises:
        InputError: The file is unreadable or is not a Parquet file, two columns have the same
            name, or no column or a required one has no JSON form.
    """
    with _open(path) as file:
        columns = _columns(path, file.schema_arrow, needed)
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in _rows(batch):
                number += 1
                yield number, row


def read_types(path: Path) -> dict[str, pa.DataType]:
    """Return the types of the columns that rows contain.

    Raises:
        InputError: The file is unreadable or is not a Parquet file.
    """
    with _open(path) as file:
        return {field.name: field.type for field in file.schema_arrow if _has_json(field.type)}


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            yield file
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error
    except OSError as error:
        if error.errno is None:  # Arrow reports damaged content as an OSError without errno
            raise InputError(f"{path} is not a readable Parquet file: {error}") from error
        raise unreadable_error(path, error) from error


def _columns(path: Path, schema: pa.Schema, needed: Collection[str]) -> list[str]:
    names = schema.names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} has several columns named {', '.join(map(repr, repeated))}")
    for needed_name in needed:
        name, _ = split_column(needed_name, names) or ("", ())
        if name and not _has_json(schema.field(name).type):
            raise InputError(
                f"{path}: column {name!r} is of type {schema.field(name).type}, which is "
                "neither text nor a number; convert the column, or use another one"
            )
    if not (sayable := [name for name in names if _has_json(schema.field(name).type)]):
        raise InputError(f"{path} has no column of text or numbers; its columns: {names}")
    return sayable


def _has_json(kind: pa.DataType) -> bool:
    return is_read_as_text(kind) or pa.types.is_float16(kind) or _is_json_type(kind)


def _is_json_type(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        return _is_json_type(kind.value_type)
    if pa.types.is_nested(kind):
        inner = [kind.field(at).type for at in range(kind.num_fields)]
        return not pa.types.is_union(kind) and all(map(_is_json_type, inner))
    return any(test(kind) for test in _AS_THEY_ARE)


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    names = batch.schema.names
    for cells in zip(*map(_cells, batch.columns), strict=True):
        yield dict(zip(names, cells, strict=True))


def _cells(column: pa.Array[Any]) -> list[Json]:
    if is_read_as_text(column.type):
        column = column.cast(pa.string())
    elif pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    return column.to_pylist()
