"""``load_results``: the results of a run as a table for Arrow, pandas, polars and notebooks."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...backends.core.errors import ConfigurationError, JournalError, MissingExtraError
from ...backends.core.fields import FieldPath, resolve_field
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json
from ...backends.inputs.column_types import describe_type
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import parse_session_number
from ...backends.storage.results import (
    RESULTS_VERSION,
    VERSION_KEY,
    iter_batches,
    read_input_names,
)
from ...backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    open_folder,
    read_evaluation,
    read_extents,
)
from ..run.result_rows import open_result_source

if TYPE_CHECKING:
    import pandas
    import polars

_ANSWER: Final = "output"
_SHOWN_ROWS: Final = 20
_SHOWN_COLUMNS: Final = 12
_SHOWN_CHARACTERS: Final = 80
_FIRST: Final = ("id", "status")
_LATER: Final = ("error_class", "error")
"""Columns that are shown after the answer, if an item failed."""


class ResultTable:
    """Rows of the results of a run; the columns are described in docs/results.md."""

    def __init__(self, table: pa.Table) -> None:
        """Wrap a table.

        Args:
            table: A table with the columns of ``results.parquet``.
        """
        self._rows = table

    @property
    def _table(self) -> pa.Table:
        return self._rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._table.num_rows

    def __repr__(self) -> str:
        """Describe the table in one line."""
        return f"<{type(self).__name__}: {self._title()}>"

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table; the answer is the struct ``output``."""
        return self._table

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a DataFrame of pandas, with a column ``output.NAME`` per field.

        Integers and booleans with missing values have pandas' nullable types.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415 - an optional package
        except ImportError as error:
            raise MissingExtraError("to_pandas()", "pandas") from error
        nullable = {
            getattr(pa, name.lower())(): getattr(pandas, f"{name}Dtype")()
            for name in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
        } | {pa.bool_(): pandas.BooleanDtype()}
        table = _flatten_answer(self._table)
        frame = table.to_pandas()
        for field in table.schema:
            column = table.column(field.name)
            if field.type in nullable and column.null_count:
                frame[field.name] = column.to_pandas(types_mapper=nullable.get)
        return frame

    def to_polars(self) -> polars.DataFrame:
        """Return the rows as a DataFrame of polars; the answer is the struct ``output``.

        Raises:
            MissingExtraError: polars is not installed.
        """
        try:
            import polars  # noqa: PLC0415 - an optional package
        except ImportError as error:
            raise MissingExtraError("to_polars()", "polars") from error
        frame = polars.from_arrow(self._table)
        assert isinstance(frame, polars.DataFrame)
        return frame

    def explode(self, field: str) -> ResultTable:
        """Return one row per element of a list; the other columns are repeated.

        The field then holds the element. A row without elements stays as one row, with null.

        Args:
            field: Name of the list: ``output.alerts``, ``input.tags``, or ``alerts`` if only the
                answer or the input has it.

        Raises:
            ConfigurationError: There is no such field, or it is not a list.
        """
        table = self._table
        column, keys, kind = self._find(field)
        if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
            lists = ", ".join(_list_names(table.schema)) or "none"
            raise ConfigurationError(f"{field!r} is of type {kind}, not a list; lists: {lists}")
        whole = _combine(table.column(column))
        values = _get_field(whole, keys)
        empty = pc.indices_nonzero(
            pc.equal(pc.fill_null(pc.list_value_length(values), 0), pa.scalar(0))
        )
        parents = pc.cast(pc.list_parent_indices(values), pa.int64())
        rows = pa.concat_arrays([parents, pc.cast(empty, pa.int64())])
        elements = pc.list_flatten(values)
        elements = pa.concat_arrays([elements, pa.nulls(len(empty), elements.type)])
        order = pc.sort_indices(pa.table({"row": rows}), sort_keys=[("row", "ascending")])
        repeated = table.take(rows.take(order))
        changed = _set_field(_combine(repeated.column(column)), keys, elements.take(order))
        at = table.schema.get_field_index(column)
        return ResultTable(repeated.set_column(at, pa.field(column, changed.type), changed))

    def _find(self, name: str) -> tuple[str, tuple[str, ...], pa.DataType]:
        """Return the column of a field, the keys within it, and its type."""
        schema = self._table.schema
        names = read_input_names(schema)
        inputs: dict[str, Json] = {
            source: describe_type(schema.field(column).type) for source, column in names.items()
        }
        answer = schema.field(_ANSWER).type
        path, _ = resolve_field(
            name,
            describe_type(answer) if pa.types.is_struct(answer) else None,
            {"type": "object", "properties": inputs},
        )
        column, keys = _locate(path, names)
        kind = schema.field(column).type
        for key in keys:
            kind = kind.field(key).type
        return column, keys, kind

    def _title(self) -> str:
        return count_nouns(len(self), "row")

    def _repr_html_(self) -> str:
        """Return the first rows as a table for notebooks; all texts are escaped."""
        table = _flatten_answer(self._table.slice(0, _SHOWN_ROWS))
        names = self._shown_columns(table.schema.names)
        head = "".join(f"<th>{_escape(name)}</th>" for name in names[:_SHOWN_COLUMNS])
        cells = table.select(names[:_SHOWN_COLUMNS]).to_pylist()
        body = "".join(
            "<tr>" + "".join(f"<td>{_format_cell(value)}</td>" for value in row.values()) + "</tr>"
            for row in cells
        )
        notes = []
        if len(self) > len(cells):
            notes.append(f"{count_nouns(len(self) - len(cells), 'more row')}")
        if more := len(table.schema.names) - min(len(names), _SHOWN_COLUMNS):
            notes.append(f"{count_nouns(more, 'more column')}")
        note = f"<p>… {', '.join(notes)}</p>" if notes else ""
        return (
            f"<div><p>{_escape(self._title())}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}</div>"
        )

    def _shown_columns(self, names: Sequence[str]) -> list[str]:
        inputs = list(read_input_names(self._table.schema).values())
        answers = [name for name in names if name == _ANSWER or name.startswith(f"{_ANSWER}.")]
        failed = pc.any(pc.equal(self._table.column("status"), pa.scalar("failed"))).as_py()
        later = _LATER if failed else ()
        room = max(1, _SHOWN_COLUMNS - len(_FIRST) - len(answers) - len(later))
        return [*_FIRST, *inputs[:room], *answers, *later]


@dataclass(frozen=True, slots=True)
class _About:
    """What is known of a run besides its rows."""

    folder: RunFolder
    provenance: Mapping[str, Any]
    aggregate: Sequence[Mapping[str, Any]]
    done: int
    failed: int


class RunResults(ResultTable):
    """Results of a run: its rows as of the time when they were loaded, aggregate and cost."""

    def __init__(self, about: _About, read: Callable[[], pa.Table]) -> None:
        """Store the arguments; :func:`load_results` makes them.

        Args:
            about: What is known of the run.
            read: Reads the rows, when they are needed.
        """
        self._about = about
        self._read = read

    @cached_property
    def _table(self) -> pa.Table:
        return self._read()

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self._about.folder.path

    @property
    def items(self) -> int:
        """Number of items of the run, without further samples of their rows."""
        found = self._about.provenance["input"]
        return int(found["items"]) // int(found.get("samples", 1))

    @property
    def done(self) -> int:
        """Number of items with an answer."""
        return self._about.done

    @property
    def failed(self) -> int:
        """Number of items that failed."""
        return self._about.failed

    @property
    def simulated(self) -> bool:
        """Whether a simulated fleet answered."""
        return bool(self._about.provenance["simulated"])

    @property
    def aggregate(self) -> list[dict[str, Any]]:
        """Results of the aggregators in ``reduce``; empty until all items have ended."""
        found: list[dict[str, Any]] = orjson.loads(orjson.dumps(self._about.aggregate))
        return found

    @cached_property
    def evaluation(self) -> list[dict[str, Any]]:
        """Comparisons of the answers with gold values, as in ``evaluation.json``.

        Empty if the run was not evaluated, and for simulated answers.

        Raises:
            JournalError: The file is damaged.
        """
        found = read_evaluation(self._about.folder)
        return [] if found is None else list(found["evaluations"])

    @cached_property
    def cost(self) -> dict[str, Any]:
        """Cost of the run so far, as ``fanfold cost --json`` prints it."""
        from ...backends.budget.cost import read_cost  # noqa: PLC0415 - slow to import

        about, folder = self._about.provenance, self._about.folder
        run = get_run_ids(about)
        with Journal(folder.journal, run, about["input"]["items"]) as journal:
            cost = read_cost(folder, run, journal.usage_by_session)
        return {"requests": cost.usage.requests, **cost.to_json()}

    def samples(self) -> ResultTable:
        """Return one row per sample, with the columns ``row_id`` and ``sample``.

        Raises:
            ConfigurationError: Each row was asked once.
            JournalError: A file of the run is damaged.
        """
        return ResultTable(_read_rows(self._about.folder, samples=True))

    def failures(self) -> ResultTable:
        """Return the rows of the items that failed."""
        table = self._table
        return ResultTable(table.filter(pc.equal(table.column("status"), pa.scalar("failed"))))

    def __len__(self) -> int:
        """Return the number of rows: the items that have ended."""
        return self.done + self.failed

    def _title(self) -> str:
        about = self._about.provenance
        kind = "SIMULATED: " if self.simulated else ""
        left = self.items - len(self)
        more = f", {left:,} not ended" if left else ""
        return (
            f"{kind}{about['name']} ({about['model']}): {self.done:,} done, {self.failed:,} failed "
            f"of {self.items:,}{more}"
        )


def load_results(folder: str | Path) -> RunResults:
    """Load the results of a run; of an unfinished run, those of the items that have ended.

    Nothing is written and nothing is locked, so that the run may be going on. Load the results
    again for those of later items.

    Args:
        folder: The run folder.

    Raises:
        ConfigurationError: The folder is not a run folder.
        JournalError: A file of the run is damaged, or of another version.
    """
    run = open_folder(Path(folder))
    about, extents = run.read_provenance(), read_extents(run)
    has_samples = about["input"].get("samples", 1) > 1
    is_written = extents is not None and not _has_later_records(run, extents)
    if is_written and not has_samples and _is_current(run.results):
        written = orjson.loads(run.aggregate.read_bytes())
        counts = written["progress"]
        known = _About(run, about, written["aggregate"], counts["done"], counts["failed"])
        return RunResults(known, lambda: _read_table(run.results))
    table = _read_rows(run)
    done = table.filter(pc.equal(table.column("status"), pa.scalar("done"))).num_rows
    aggregate = orjson.loads(run.aggregate.read_bytes())["aggregate"] if is_written else ()
    return RunResults(_About(run, about, aggregate, done, len(table) - done), lambda: table)


def _read_rows(run: RunFolder, *, samples: bool = False) -> pa.Table:
    """Return the results from the journal."""
    with open_result_source(run, samples=samples) as source:
        batches = list(iter_batches(source.iter_rows(), source.layout))
        return pa.Table.from_batches(batches, source.layout.to_arrow())


def _has_later_records(folder: RunFolder, extents: Mapping[str, int]) -> bool:
    """Return True if a session after the aggregate was written has recorded items."""
    last = max((parse_session_number(Path(name)) for name in extents), default=0)
    return any(parse_session_number(path) > last for path in folder.journal.glob("*.jsonl"))


def _is_current(path: Path) -> bool:
    """Return True if a table has the columns that this version writes."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):  # missing or damaged; the journal has everything
        return False
    return metadata.get(VERSION_KEY) == RESULTS_VERSION.encode()


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise JournalError(f"{path}: cannot be read: {error}; load the results again") from error


def _locate(path: FieldPath, names: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return the column of a field that exists, and the keys within it."""
    if path.source == "output":
        return _ANSWER, path.keys
    counts = range(len(path.keys), 0, -1)
    count = next(n for n in counts if ".".join(path.keys[:n]) in names)
    return names[".".join(path.keys[:count])], path.keys[count:]


def _list_names(schema: pa.Schema) -> list[str]:
    """Return the names of the lists in the answer and in the input."""
    found = [source for source, name in read_input_names(schema).items() if _is_list(schema, name)]
    answer = schema.field(_ANSWER).type
    if pa.types.is_struct(answer):
        found += [f"{_ANSWER}.{part.name}" for part in answer if pa.types.is_list(part.type)]
    return found + [_ANSWER] * _is_list(schema, _ANSWER)


def _is_list(schema: pa.Schema, name: str) -> bool:
    return pa.types.is_list(schema.field(name).type)


def _combine(column: pa.ChunkedArray[Any]) -> Any:
    found = column.combine_chunks()
    return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found


def _get_field(values: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        values = pc.struct_field(values, [values.type.get_field_index(key)])
    return values


def _set_field(values: Any, keys: Sequence[str], new: Any) -> Any:
    """Return structs with another value in one place."""
    if not keys:
        return new
    at = values.type.get_field_index(keys[0])
    parts = [pc.struct_field(values, [n]) for n in range(values.type.num_fields)]
    parts[at] = _set_field(parts[at], keys[1:], new)
    fields = [pa.field(values.type.field(n).name, part.type) for n, part in enumerate(parts)]
    return pa.StructArray.from_arrays(parts, fields=fields, mask=values.is_null())


def _flatten_answer(table: pa.Table) -> pa.Table:
    """Return a table with a column per field of the answer, in place of the struct."""
    at = table.schema.get_field_index(_ANSWER)
    for parts in (_flatten(_ANSWER, table.column(at)), _flatten(_ANSWER, table.column(at), 1)):
        if len({name for name, _ in parts}) == len(parts):
            break  # two names are equal if one contains a dot; then only one level is taken apart
    flat = table.remove_column(at)
    for n, (name, values) in enumerate(parts):
        flat = flat.add_column(at + n, name, values)
    return flat


def _flatten(name: str, values: Any, levels: int = -1) -> list[tuple[str, Any]]:
    """Return the fields of structs by name, down to a number of levels."""
    if not levels or not pa.types.is_struct(values.type):
        return [(name, values)]
    return [
        pair
        for n, field in enumerate(values.type)
        for pair in _flatten(f"{name}.{field.name}", pc.struct_field(values, [n]), levels - 1)
    ]


def _format_cell(value: Json) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    return _escape(text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…")


_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


def _escape(text: str) -> str:
    return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text))
