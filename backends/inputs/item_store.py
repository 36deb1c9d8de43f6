"""Item store (``items.arrow``): written once, read by index; and loading of inputs."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from io import IOBase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import orjson
import pyarrow as pa

from ..core.arrow_columns import make_column
from ..core.errors import InputError, JournalError
from ..core.types import Item, Json, Row, make_sample_id
from .base import InputSummary, ItemEntry, SkippedRow
from .column_types import ColumnTypes, decode_schema, describe_columns, encode_schema

if TYPE_CHECKING:
    from ...configs.models import InputConfig
    from .column_types import ArrowTypes

VERSION: Final = "2"
VERSION_KEY: Final = b"fanfold.items"
SUMMARY_KEY: Final = b"fanfold.summary"
_FIELDS: Final[list[tuple[str, pa.DataType]]] = [
    ("id", pa.string()),
    ("row", pa.binary()),
    ("problem", pa.string()),
]
SCHEMA: Final = pa.schema(
    _FIELDS,
    metadata={VERSION_KEY: VERSION.encode()},
)


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """Metadata of an item store.

    Attributes:
        starts: Index of the first item of each batch, ascending from 0.
        items: Number of rows.
        columns: Names of the columns over all items.
        digest: Digest over ids and rows, hexadecimal.
        skipped: The first skipped rows.
        skipped_total: Number of skipped rows.
        invalid: Number of rows that carry a problem.
        source: The input in words.
        types: Types of the columns, as text.
        id_column: Column whose texts are the ids of all rows, or None.
        samples: Items of each row.
    """

    starts: tuple[int, ...]
    items: int
    columns: tuple[str, ...]
    digest: str
    skipped: tuple[SkippedRow, ...]
    skipped_total: int
    invalid: int
    source: str
    types: str
    id_column: str | None
    samples: int = 1

    def to_json(self) -> bytes:
        """Convert to JSON."""
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, data: bytes) -> StoreHeader:
        """Read from JSON.

        Args:
            data: Result of `to_json`.

        Raises:
            ValueError: The data is not JSON.
            KeyError: A field is missing.
            TypeError: A field has another type.
        """
        found: dict[str, Any] = orjson.loads(data)
        return cls(
            starts=tuple(found["starts"]),
            items=found["items"],
            columns=tuple(found["columns"]),
            digest=found["digest"],
            skipped=tuple(SkippedRow(one["id"], one["reason"]) for one in found["skipped"]),
            skipped_total=found["skipped_total"],
            invalid=found["invalid"],
            source=found["source"],
            types=found["types"],
            id_column=found["id_column"],
            samples=found.get("samples", 1),
        )


class ItemStore:
    """Items of a run, read from their file by index.

    If rows have several samples, each sample is an item, and those of a row follow each other. The
    file has each row once.

    Memory holds one number per batch of at most 256 items and no items. The file is not mapped
    into memory: pages of a map count as memory of the process, and a map whose file shrinks on a
    shared file system ends the process. Several threads may read at the same time.
    """

    def __init__(self, path: Path) -> None:
        """Open a store.

        Args:
            path: The store's path.

        Raises:
            JournalError: The file is missing or is not a complete item store.
        """
        self._path = path
        with self._convert_errors():
            self._file = pa.OSFile(str(path), "r")
            try:
                self._reader = pa.ipc.open_file(self._file)
                self._header = self._load_header()
                self._types = decode_schema(self._header.types)
            except BaseException:
                self._file.close()
                raise

    def __len__(self) -> int:
        """Return the number of items."""
        return self._header.items * self._header.samples

    @property
    def samples(self) -> int:
        """Number of items of each row."""
        return self._header.samples

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns over all items, in order of appearance."""
        return self._header.columns

    @property
    def types(self) -> pa.Schema:
        """The columns with the types that they were read with, in order of appearance."""
        return self._types

    @property
    def id_column(self) -> str | None:
        """Column whose texts are the ids of all rows, unchanged; None if there is none."""
        return self._header.id_column

    @property
    def digest(self) -> str:
        """Digest over ids and rows, hexadecimal."""
        return self._header.digest

    @property
    def skipped(self) -> tuple[SkippedRow, ...]:
        """The first 1,000 skipped rows."""
        return self._header.skipped

    @property
    def invalid(self) -> int:
        """Number of items that carry a problem."""
        return self._header.invalid * self._header.samples

    def read(self, lo: int, hi: int) -> list[Item]:
        """Read a range of items.

        Args:
            lo: Index of the first item, from 0.
            hi: Index after the last item, at most ``len(store)``.

        Returns:
            The ``hi - lo`` items in order.

        Raises:
            IndexError: The range is not within the store.
            JournalError: The file is damaged.
        """
        self._check_range(lo, hi)
        with self._convert_errors():
            return list(self._items(lo, hi))

    def read_ids(self, lo: int, hi: int) -> list[str]:
        """Read the ids of a range of items, without their columns.

        Args:
            lo: Index of the first item, from 0.
            hi: Index after the last item, at most ``len(store)``.

        Raises:
            IndexError: The range is not within the store.
            JournalError: The file is damaged.
        """
        self._check_range(lo, hi)
        samples, ids = self._header.samples, list[Any]()
        with self._convert_errors():
            for _, part in self._iter_parts(lo // samples, -(-hi // samples)):
                ids += part.column(0).to_pylist()
        if samples == 1:
            return ids
        named = [make_sample_id(name, sample) for name in ids for sample in range(samples)]
        return named[lo % samples :][: hi - lo]

    def _check_range(self, lo: int, hi: int) -> None:
        if not 0 <= lo <= hi <= len(self):
            raise IndexError(f"items {lo} to {hi} of {len(self)} in {self._path}")

    def read_at(self, indices: Sequence[int]) -> list[Item]:
        """Read single items.

        Args:
            indices: Their indices, in any order.

        Returns:
            The items in that order.

        Raises:
            IndexError: One is not within the store.
            JournalError: The file is damaged.
        """
        if indices and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"items {min(indices)} to {max(indices)} of {len(self)}")
        samples, starts = self._header.samples, self._header.starts
        wanted = dict[int, list[int]]()
        for place, index in enumerate(indices):
            batch = bisect_right(starts, index // samples) - 1
            wanted.setdefault(batch, []).append(place)
        items = list[Item | None]([None]) * len(indices)
        with self._convert_errors():
            for batch, places in wanted.items():
                rows = [indices[place] // samples - starts[batch] for place in places]
                part = self._reader.get_batch(batch).take(make_column(rows, pa.int64()))
                columns: list[list[Any]] = [column.to_pylist() for column in part.columns]
                ids, data, problems = columns
                for place, name, row, problem in zip(places, ids, data, problems, strict=True):
                    index, sample = indices[place], indices[place] % samples
                    own = make_sample_id(name, sample) if sample else name
                    items[place] = Item(index, own, orjson.loads(row), problem, sample)
        return [item for item in items if item is not None]

    def find_longest_row(self) -> int:
        """Return the bytes of the longest item, with its columns as compact JSON.

        Raises:
            JournalError: The file is damaged.
        """
        import pyarrow.compute as pc  # noqa: PLC0415 - slow to import, and workers need it not

        with self._convert_errors():
            batches = map(self._reader.get_batch, range(len(self._header.starts)))
            columns: Iterator[Any] = (one.column("row") for one in batches)
            return max(int(pc.max(pc.binary_length(one)).as_py()) for one in columns)

    def iter_ids(self) -> Iterator[str]:
        """Yield the ids of all items in order, without their columns.

        Raises:
            JournalError: The file is damaged.
        """
        for number in range(len(self._header.starts)):
            with self._convert_errors():
                names: list[Any] = self._reader.get_batch(number).column("id").to_pylist()
            for name in names:
                yield from (make_sample_id(name, n) for n in range(self._header.samples))

    def iter_rows(self, indices: Iterable[int]) -> Iterator[tuple[Row, int]]:
        """Yield the columns of items, and their size in bytes; fast for rising indices.

        Raises:
            JournalError: The file is damaged.
        """
        rows: list[Any] = []
        start = 0
        for index in indices:
            number = index // self._header.samples
            with self._convert_errors():
                if not start <= number < start + len(rows):
                    at = bisect_right(self._header.starts, number) - 1
                    start = self._header.starts[at]
                    rows = self._reader.get_batch(at).column("row").to_pylist()
                row: Row = orjson.loads(rows[number - start])
            yield row, len(rows[number - start])

    def summary(self) -> InputSummary:
        """Return the summary of the input that was written to the store.

        Raises:
            JournalError: The file is damaged.
        """
        header = self._header
        return InputSummary(
            items=len(self),
            columns=header.columns,
            row_schema=describe_columns(self._types),
            digest=header.digest,
            skipped=header.skipped,
            skipped_total=header.skipped_total,
            invalid=self.invalid,
            source=header.source,
            first=self.read(0, 1)[0],
            samples=header.samples,
        )

    def close(self) -> None:
        """Close the file; further calls have no effect."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def _items(self, lo: int, hi: int) -> Iterator[Item]:
        """Yield items; those of one row have columns of their own, which callers may change."""
        samples = self._header.samples
        if samples == 1:
            yield from self._iter_first_samples(lo, hi)
            return
        for row in self._iter_first_samples(lo // samples, -(-hi // samples)):
            first = row.index * samples
            for sample in range(max(0, lo - first), min(samples, hi - first)):
                yield Item(
                    first + sample,
                    make_sample_id(row.id, sample),
                    row.row if sample == 0 else orjson.loads(orjson.dumps(row.row)),
                    row.problem,
                    sample,
                )

    def _iter_first_samples(self, lo: int, hi: int) -> Iterator[Item]:
        """Yield the first item of each row, with the number of the row as its index."""
        for start, part in self._iter_parts(lo, hi):
            columns: list[list[Any]] = [column.to_pylist() for column in part.columns]
            ids, rows, problems = columns
            for index, (name, row, problem) in enumerate(
                zip(ids, rows, problems, strict=True), start=start
            ):
                yield Item(index, name, orjson.loads(row), problem)

    def _iter_parts(self, lo: int, hi: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the parts of batches that have some rows, each with the number of its first row."""
        starts = self._header.starts
        at = bisect_right(starts, lo) - 1
        while lo < hi:
            batch = self._reader.get_batch(at)
            skip = lo - starts[at]
            part = batch.slice(skip, min(hi - lo, batch.num_rows - skip))
            yield lo, part
            lo += part.num_rows
            at += 1

    def _load_header(self) -> StoreHeader:
        version = (self._reader.schema.metadata or {}).get(VERSION_KEY)
        if version is None:
            raise ValueError("it has other content")
        if version.decode() != VERSION:
            raise JournalError(
                f"{self._path}: it has layout {version.decode()}, this fanfold reads {VERSION}: "
                "finish the run with the fanfold that started it, or start a new run"
            )
        last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
        header = StoreHeader.from_json(last.custom_metadata[SUMMARY_KEY])
        if len(header.starts) != self._reader.num_record_batches - 1:
            raise ValueError("its summary and its batches differ")
        return header

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise JournalError(
                f"{self._path} is not a complete item store of fanfold: {reason}; if the run "
                "folder is yours and this file is damaged, start a new run in another folder"
            ) from error


_BATCH_ROWS: Final = 256
_BATCH_BYTES: Final = 2**20
_DIGEST_BYTES: Final = 16


class EntrySource(Protocol):
    """What an item store is written from; counts and columns are complete at the end.

    Attributes:
        source: The input in words.
        columns: Names of the columns.
        skipped: The first skipped rows.
        skipped_total: Number of skipped rows.
        invalid: Number of items that carry a problem.
        id_column: Column whose texts are the ids of all items, or None.
    """

    source: str
    columns: dict[str, None]
    skipped: list[SkippedRow]
    skipped_total: int
    invalid: int
    id_column: str | None

    def iter_entries(self) -> Generator[ItemEntry, None, None]:
        """Yield the items in order.

        Raises:
            InputError: A row does not fit, or there are no rows.
        """
        ...

    def read_types(self) -> ArrowTypes:
        """Return the types that the input declares for its columns."""
        ...


class NamedRows:
    """Rows that have their ids already, such as the results of a stage; see `EntrySource`.

    Args:
        source: The rows in words.
        rows: Yields id and columns of each item, in order; the ids are unique.
        types: Types of columns, as far as they are known.
        id_column: Column whose texts are the ids of all items, or None.
    """

    def __init__(
        self,
        source: str,
        rows: Iterable[tuple[str, Row]],
        types: ArrowTypes | None = None,
        id_column: str | None = None,
    ) -> None:
        self.source, self._rows, self._types = source, rows, types or {}
        self.columns: dict[str, None] = {}
        self.skipped: list[SkippedRow] = []
        self.skipped_total = self.invalid = 0
        self.id_column = id_column

    def iter_entries(self) -> Generator[ItemEntry, None, None]:
        """Yield the items in order.

        Raises:
            InputError: There are no rows.
        """
        is_empty, names_items = True, True
        for name, row in self._rows:
            is_empty = False
            names_items = names_items and row.get("id") == name
            self.columns.update(dict.fromkeys(row))
            yield ItemEntry(name, orjson.dumps(row), None, row)
        if names_items and self.id_column is None:  # e.g. documents put together from their parts
            self.id_column = "id"
        if is_empty:
            raise InputError(f"{self.source}: there are no items; nothing to run")

    def read_types(self) -> ArrowTypes:
        """Return the types of the columns that are known."""
        return self._types


def write_store(target: Path, screen: EntrySource, samples: int = 1) -> None:
    """Write the validated items to a temporary file beside the target, then rename it.

    Args:
        target: The store's path; its folder must exist.
        screen: Yields the items; its errors are passed on.
        samples: Items of each row.

    Raises:
        JournalError: The file cannot be written.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # "x": never follow a link that already exists
            _write(file, screen, samples)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:  # from writing only: sources raise InputError
        raise JournalError(
            f"the items cannot be written to {target}: {error.strerror or error}; free disk space "
            "or choose another folder for the run"
        ) from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def _write(file: IOBase, screen: EntrySource, samples: int) -> None:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    starts: list[int] = []
    items = 0
    types: ColumnTypes | None = None
    with pa.ipc.new_file(file, SCHEMA) as sink, closing(screen.iter_entries()) as entries:
        for batch in _batches(entries):
            if types is None:
                types = ColumnTypes(screen.read_types())
            types.add_rows([entry.values for entry in batch])
            _update_digest(digest, batch)
            sink.write_batch(_columns(batch))
            starts.append(items)
            items += len(batch)
        assert types is not None, "an input without rows is refused"
        header = StoreHeader(
            starts=tuple(starts),
            items=items,
            columns=tuple(screen.columns),
            digest=digest.hexdigest(),
            skipped=tuple(screen.skipped),
            skipped_total=screen.skipped_total,
            invalid=screen.invalid,
            source=screen.source,
            types=encode_schema(types.to_schema(screen.columns)),
            id_column=screen.id_column,
            samples=samples,
        )
        sink.write_batch(_columns([]), custom_metadata={SUMMARY_KEY: header.to_json()})


def _batches(entries: Iterable[ItemEntry]) -> Iterable[list[ItemEntry]]:
    """Group entries so that a batch is bounded both in rows and in bytes."""
    batch: list[ItemEntry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += len(entry.row)
        if len(batch) == _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _columns(batch: list[ItemEntry]) -> pa.RecordBatch:
    columns: tuple[Sequence[Any], ...] = (
        [entry.id for entry in batch],
        [entry.row for entry in batch],
        [entry.problem for entry in batch],
    )
    arrays = [make_column(one, part.type) for one, part in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def _update_digest(digest: blake2b, batch: list[ItemEntry]) -> None:
    """Add ids and rows, each with its length, so that different inputs have different digests."""
    named = [(entry.id.encode(), entry.row) for entry in batch]
    digest.update(b"".join(b"%d %d %b%b" % (len(n), len(row), n, row) for n, row in named))


def load_input(  # noqa: PLR0913 - each is given by one kind of caller
    config: InputConfig,
    target: Path,
    columns: Collection[str],
    items: Sequence[Mapping[str, Json]] | None = None,
    *,
    only: Collection[str] | None = None,
    samples: int = 1,
) -> InputSummary:
    """Read and check an input and write its items to a store.

    This blocks: from a coroutine, call it through `asyncio.to_thread`. Rows are read one by one;
    memory grows with the number of ids only (about 100 bytes each, to find repeated ones).

    Args:
        config: The settings of the input.
        target: The store's path; its folder must exist. An existing store is replaced.
        columns: Columns that the task needs.
        items: Rows already in memory, which replace the configured path or dataset. They have the
            configured id column only if any of them contains it.
        only: Ids of the rows to write; None writes all.
        samples: Items of each row.

    Raises:
        InputError: The input cannot be read, or its rows do not fit; nothing was written.
        MissingExtraError: A required extra is not installed; nothing was written.
        JournalError: The store cannot be written.
    """
    # Readers of a store need neither the formats nor the models of the settings.
    from .formats import open_source  # noqa: PLC0415
    from .screening import RowValidator  # noqa: PLC0415

    if items is not None and not any(isinstance(i, Mapping) and config.id in i for i in items):
        config = config.model_copy(update={"id": None})
    needed = {*columns, *(name for name in (config.id, config.smiles) if name is not None)}
    screen = RowValidator(config, open_source(config, needed, items), columns, only, samples)
    write_store(target, screen, samples)
    with ItemStore(target) as store:
        return store.summary()


def load_rows(target: Path, source: EntrySource, samples: int = 1) -> InputSummary:
    """Write rows that have their ids already to a store; blocks.

    Args:
        target: The store's path; its folder must exist. An existing store is replaced.
        source: The rows.
        samples: Items of each row.

    Raises:
        InputError: There are no rows.
        JournalError: The store cannot be written.
    """
    write_store(target, source, samples)
    with ItemStore(target) as store:
        return store.summary()


def compute_rows_digest(source: EntrySource) -> str:
    """Return the digest that a store of these rows would have; blocks.

    Raises:
        InputError: There are no rows.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    with closing(source.iter_entries()) as entries:
        for batch in _batches(entries):
            _update_digest(digest, batch)
    return digest.hexdigest()
