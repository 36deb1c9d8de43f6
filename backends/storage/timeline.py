"""``timeline.arrow``: what each endpoint of a run did over time, in at most 1,000 bins."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from ..core.arrow_columns import make_column, make_scalar, read_numbers, write_numbers
from ..core.errors import JournalError
from ..core.timeline import BASE_MS, TimelineDelta
from .results import replace_file

if TYPE_CHECKING:
    from io import IOBase

FILE_NAME: Final = "timeline.arrow"
VERSION_KEY: Final = b"fanfold.timeline.version"
VERSION: Final = b"1"
MOST_BINS: Final = 1_000
MOST_ROWS: Final = 500_000
"""Limit of rows, which thousands of endpoints reach before they have so many bins."""
_COLUMNS: Final[list[tuple[str, pa.DataType]]] = [
    ("start", pa.timestamp("ms", tz="UTC")),
    ("seconds", pa.float64()),
    ("endpoint", pa.dictionary(pa.int32(), pa.string())),
    ("calls", pa.int64()),
    ("failures", pa.map_(pa.string(), pa.int64())),
    ("in_flight", pa.float64()),
    ("input_tokens", pa.int64()),
    ("output_tokens", pa.int64()),
    ("latency_s", pa.float64()),
]
SCHEMA: Final = pa.schema(_COLUMNS, metadata={VERSION_KEY: VERSION})
_CLASS_BITS: Final = 6
_ENDPOINT_BITS: Final = 20
_BIN_SHIFT: Final = _CLASS_BITS + _ENDPOINT_BITS
_MOST_CLASSES: Final = 1 << _CLASS_BITS
_MOST_ENDPOINTS: Final = 1 << _ENDPOINT_BITS
OTHER_CLASSES: Final = "other classes"
OTHER_ENDPOINTS: Final = "other endpoints"
_NUMBERS: Final[list[tuple[str, pa.DataType]]] = [
    ("key", pa.int64()),
    ("calls", pa.int64()),
    ("flight_s", pa.float64()),
    ("input_tokens", pa.int64()),
    ("output_tokens", pa.int64()),
    ("latency_s", pa.float64()),
]
_ROWS: Final = pa.schema(_NUMBERS)
_FAILURES: Final = pa.schema([("key", pa.int64()), ("count", pa.int64())])
_Row = tuple[int, int, float, int, int, float]
_LATE_BINS: Final = 8
_MOST_RECENT: Final = 1 << 15
_MOST_KEY: Final = (1 << 63) - 1


class _Sums:
    """Rows of numbers, added up by key; keys sort by bin, endpoint and class.

    A sum over one number as the key takes a fraction of the time that one over several columns
    takes. Rows that are not recent are only touched by late reports.

    Args:
        schema: The key and the numbers.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._old = self._recent = _make_table([], schema)
        self._bound = self._old_bins = 0

    @property
    def num_rows(self) -> int:
        return self._old.num_rows + self._recent.num_rows

    def count_bins(self) -> int:
        return self._old_bins + _count_bins(self._recent)

    def table(self) -> pa.Table:
        return pa.concat_tables([self._old, self._recent])

    def add(self, new: pa.Table, width: int) -> None:
        """Add rows, and sort them.

        Args:
            new: The rows.
            width: Width of the bins as a multiple of the shortest.
        """
        if not new.num_rows:
            return
        new = _floor(new, width)
        if (first := _scalar(pc.min(new["key"]))) < self._bound:
            self._reopen(first >> _BIN_SHIFT << _BIN_SHIFT)
        self._recent = _sum(pa.concat_tables([self._recent, new]))
        if self._recent.num_rows > _MOST_RECENT:
            self._settle(width)

    def restore(self, table: pa.Table, width: int) -> None:
        """Take over rows in any order, in place of those that there are."""
        order = pc.sort_indices(table, [("key", "ascending")])
        self._old, self._recent = table.take(order), _make_table([], self._schema)
        self.widen(width)

    def widen(self, width: int) -> None:
        """Make all bins wider, a part of the rows after the other: it takes less memory."""
        table, start = self.table(), 0
        sums = [_make_table([], self._schema)]
        while start < table.num_rows:
            last = min(start + _MOST_RECENT, table.num_rows) - 1
            bin_ = _scalar(table["key"][last]) >> _BIN_SHIFT
            end = _find(table, ((bin_ & -width) + width) << _BIN_SHIFT)
            sums.append(_sum(_floor(table.slice(start, end - start), width)))
            start = end
        self._old, self._recent = pa.concat_tables(sums), _make_table([], self._schema)
        self._old_bins = _count_bins(self._old)
        self._bound = _MOST_KEY

    def _reopen(self, key: int) -> None:
        """Make the rows from a key on recent again."""
        place = _find(self._old, key)
        self._recent = pa.concat_tables([self._old.slice(place), self._recent])
        self._old, self._bound = self._old.slice(0, place), key
        self._old_bins = _count_bins(self._old)

    def _settle(self, width: int) -> None:
        """Take the rows for done that no report in time will change."""
        newest = _scalar(self._recent["key"][-1]) >> _BIN_SHIFT
        self._bound = (newest - _LATE_BINS * width) << _BIN_SHIFT
        place = _find(self._recent, self._bound)
        settled = self._recent.slice(0, place)
        self._old_bins += _count_bins(settled)
        self._old = pa.concat_tables([self._old, settled])
        self._recent = self._recent.slice(place)


def _find(table: pa.Table, key: int) -> int:
    """Return the place of the first row with a key at least as large."""
    keys = table["key"]
    return bisect_left(range(table.num_rows), key, key=lambda place: _scalar(keys[place]))


def _count_bins(table: pa.Table) -> int:
    return int(_scalar(pc.count_distinct(pc.shift_right(table["key"], _int(_BIN_SHIFT)))))


def _floor(table: pa.Table, width: int) -> pa.Table:
    """Move rows to the bins of a width that is a power of two."""
    mask = ~((width - 1) << _BIN_SHIFT)
    return table.set_column(0, "key", pc.bit_wise_and(table["key"], _int(mask)))


def _sum(table: pa.Table) -> pa.Table:
    """Return the rows sorted by key, each key once; ``group_by`` of Arrow imports pandas."""
    if not table.num_rows:
        return table
    table = table.take(pc.sort_indices(table, [("key", "ascending")]))
    numbers = [read_numbers(_combine(column)) for column in table.columns]
    starts = np.flatnonzero(np.diff(numbers[0], prepend=-1))
    sums = [numbers[0][starts], *(np.add.reduceat(one, starts) for one in numbers[1:])]
    columns = [write_numbers(one, part.type) for one, part in zip(sums, table.schema, strict=True)]
    return pa.table(columns, schema=table.schema)


class Timeline:
    """The timeline of a run: rows by bin and endpoint, and the file with them.

    Bins begin at multiples of their width since 1970, and only those are kept in which something
    happened. So the time between two sessions takes no bins. When there are too many, the width
    doubles. The methods block; one thread at a time may call them.

    Args:
        path: The file; what an earlier session wrote is kept.

    Attributes:
        width_ms: Width of the bins in ms.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.width_ms = BASE_MS
        self._endpoints: dict[str, int] = {}
        self._classes: dict[str, int] = {}
        self._rows, self._failures = _Sums(_ROWS), _Sums(_FAILURES)

    def load(self) -> None:
        """Read what earlier sessions wrote.

        Raises:
            JournalError: The file cannot be read; the timeline stays empty.
        """
        if not self._path.exists():
            return
        table = read_timeline(self._path)
        if not table.num_rows:
            return
        seconds = table["seconds"]
        self.width_ms = _read_width(self._path, table)
        names = _combine(table["endpoint"].unify_dictionaries())
        ids = [self._endpoint_id(name) for name in names.dictionary.to_pylist()]
        endpoints = pc.shift_left(make_column(ids, pa.int64()), _int(_CLASS_BITS)).take(
            names.indices
        )
        starts = pc.divide(_combine(table["start"].cast(pa.int64())), _int(BASE_MS))
        keys = pc.bit_wise_or(pc.shift_left(starts, _int(_BIN_SHIFT)), endpoints)
        numbers = [
            table["calls"],
            pc.multiply(table["in_flight"], seconds),
            table["input_tokens"],
            table["output_tokens"],
            table["latency_s"],
        ]
        width = self.width_ms // BASE_MS
        self._rows.restore(pa.table([keys, *numbers], schema=_ROWS), width)
        parents, names, counts = _unnest(table["failures"])
        found = names.dictionary_encode()
        classes = [self._class_id(name) for name in found.dictionary.to_pylist()]
        codes = make_column(classes, pa.int64()).take(found.indices)
        keys = pc.bit_wise_or(keys.take(parents), codes)
        self._failures.restore(pa.table([keys, counts], schema=_FAILURES), width)

    def add(self, deltas: Iterable[TimelineDelta]) -> None:
        """Add what processes report."""
        rows, failures, width_ms = list[_Row](), list[tuple[int, int]](), self.width_ms
        for delta in deltas:
            width_ms = max(width_ms, delta.width_ms)
            for (start, label), one in delta.cells.items():
                key = (start // BASE_MS << _BIN_SHIFT) | (self._endpoint_id(label) << _CLASS_BITS)
                tokens = one.input_tokens, one.output_tokens
                rows.append((key, one.calls, one.flight_s, *tokens, one.latency_s))
                for name, count in one.failures.items():
                    failures.append((key | self._class_id(name), count))
        if width_ms > self.width_ms:
            self._widen(width_ms)
        self._rows.add(_make_table(rows, _ROWS), width_ms // BASE_MS)
        self._failures.add(_make_table(failures, _FAILURES), width_ms // BASE_MS)
        while (bins := self._rows.count_bins()) > 1 and (
            bins > MOST_BINS or self._rows.num_rows > MOST_ROWS
        ):
            self._widen(2 * self.width_ms)

    def _widen(self, width_ms: int) -> None:
        self.width_ms = width_ms
        self._rows.widen(width_ms // BASE_MS)
        self._failures.widen(width_ms // BASE_MS)

    def write(self) -> None:
        """Replace the file in one step.

        Raises:
            JournalError: It cannot be written; the old file is untouched.
        """
        rows = self._rows.table().combine_chunks()
        seconds = make_scalar(self.width_ms / 1000, pa.float64())
        keys, names = _combine(rows["key"]), make_column([*self._endpoints], pa.string())
        starts = pc.multiply(pc.shift_right(keys, _int(_BIN_SHIFT)), _int(BASE_MS))
        ids = pc.bit_wise_and(pc.shift_right(keys, _int(_CLASS_BITS)), _int(_MOST_ENDPOINTS - 1))
        columns = [
            starts.cast(SCHEMA.field("start").type),
            pa.repeat(seconds, rows.num_rows),
            pa.DictionaryArray.from_arrays(ids.cast(pa.int32()), names),
            rows["calls"],
            self._build_maps(keys),
            pc.divide(rows["flight_s"], seconds),
            rows["input_tokens"],
            rows["output_tokens"],
            rows["latency_s"],
        ]
        table = pa.table(columns, schema=SCHEMA)
        options = ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        with (
            replace_file(self._path) as file,
            ipc.new_file(cast("IOBase", file), SCHEMA, options=options) as writer,
        ):
            writer.write_table(table)

    def _endpoint_id(self, name: str) -> int:
        return _number(self._endpoints, name, _MOST_ENDPOINTS, OTHER_ENDPOINTS)

    def _class_id(self, name: str) -> int:
        return _number(self._classes, name, _MOST_CLASSES, OTHER_CLASSES)

    def _build_maps(self, keys: Any) -> Any:
        """Return the failures of each row as a map.

        Args:
            keys: The rows' keys, sorted.
        """
        failures = self._failures.table().combine_chunks()
        owners = pc.bit_wise_and(_combine(failures["key"]), _int(~(_MOST_CLASSES - 1)))
        counts: Any = pc.value_counts(owners).flatten()
        lengths = pc.fill_null(counts[1].take(pc.index_in(keys, counts[0])), _int(0))
        ends = _combine(pc.cumulative_sum(lengths)).cast(pa.int32())
        classes = pc.bit_wise_and(_combine(failures["key"]), _int(_MOST_CLASSES - 1))
        maps: Any = pa.MapArray
        return maps.from_arrays(
            pa.concat_arrays([make_column([0], pa.int32()), ends]),
            make_column([*self._classes], pa.string()).take(classes),
            _combine(failures["count"]),
        )


def _read_width(path: Path, table: pa.Table) -> int:
    """Return the width of the bins in ms.

    Raises:
        JournalError: A number of the table is impossible.
    """
    low, high = pc.min(table["seconds"]), pc.max(table["seconds"])
    width_ms = round(1000 * _scalar(high)) if table["seconds"].null_count == 0 else 0
    steps = width_ms // BASE_MS
    whole = steps >= 1 and width_ms == BASE_MS * steps and steps & (steps - 1) == 0
    least = min(_scalar(pc.min(table[name].cast(pa.int64()))) for name in ("start", "calls"))
    holes = any(column.null_count for column in table.columns)
    if holes or low != high or not whole or least < 0:
        raise JournalError(f"{path}: damaged: its bins or counts are impossible")
    return width_ms


def _number(known: dict[str, int], name: str, most: int, others: str) -> int:
    """Return the number of a name; the last number stands for all names from the limit on."""
    if name not in known and len(known) >= most - 1:
        name = others
    return known.setdefault(name, len(known))


def _make_table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    made = [make_column(one, part.type) for one, part in zip(columns, schema, strict=True)]
    return pa.table(made, schema=schema)


def _unnest(failures: Any) -> tuple[Any, Any, Any]:
    """Return the row, the error class and the count of each entry in a column of maps."""
    maps = _combine(failures)
    # the functions for lists refuse maps, and some of them abort the process
    rows = pc.list_parent_indices(pa.ListArray.from_arrays(maps.offsets, maps.keys))
    return rows, maps.keys, maps.items


def _int(value: int) -> Any:
    return make_scalar(value, pa.int64())


def _scalar(value: Any) -> Any:
    return value.as_py()


def _combine(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def read_timeline(path: Path) -> pa.Table:
    """Return the rows of a timeline, sorted by bin and endpoint.

    Raises:
        JournalError: The file is missing, damaged or of another version.
    """
    try:
        with path.open("rb") as file:
            table = ipc.open_file(file).read_all()
    except FileNotFoundError:
        raise JournalError(f"{path}: not found; a session writes it as it runs") from None
    except (OSError, pa.ArrowException) as error:
        raise JournalError(f"{path}: cannot be read: {error}") from None
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version != VERSION or table.schema != SCHEMA:
        found = repr(version.decode(errors="replace")) if version else "none"
        raise JournalError(f"{path}: not a timeline of version {VERSION.decode()} (found {found})")
    return table


def list_failures(table: pa.Table) -> pa.Table:
    """Return the failures of a timeline, a row per bin, endpoint and error class.

    Args:
        table: The timeline, as :func:`read_timeline` returns it.

    Returns:
        The columns ``start``, ``endpoint``, ``class`` and ``count``.
    """
    rows, names, counts = _unnest(table["failures"])
    starts, endpoints = (_combine(table[name]).take(rows) for name in ("start", "endpoint"))
    return pa.table({"start": starts, "endpoint": endpoints, "class": names, "count": counts})
