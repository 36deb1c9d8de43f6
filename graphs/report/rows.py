"""Rows of a report: the columns of its table, and what its item pane shows, as compressed JSON."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Final

import orjson
import pyarrow as pa

from ...backends.core.templates import ItemPrompt
from ...backends.storage.results import ResultLayout, iter_batches
from ...backends.storage.results_schema import ResultRow
from ..run.result_rows import ResultSource, list_asked_columns
from .flags import FLAGS, MOST_ROWS, RowFacts
from .texts import shorten, shorten_json, to_cell, to_text

BLOCK_ROWS: Final = 1_000
"""Rows whose details are compressed together, and read together by the page."""

_MOST_DETAILS: Final = 96 << 20
"""Compressed bytes from which prompts and reasoning of further rows are left out."""

_MOST_LEVELS: Final = 200
"""Distinct texts up to which a column is one of categories."""

_NUMBER: Final = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,2})?")
_MOST_DIGITS: Final = 25
"""Numbers in texts; those with leading zeros are names."""

_TOP: Final = 5
_EXACT: Final = 1 << 53
_LEVEL: Final = 6
"""Compression level: 9 takes three times as long and saves three per cent."""

_HIDDEN: Final = frozenset(
    {"output", "reasoning", "simulated", "fingerprint", "error", "prompt", "raw"}
)
"""Columns of the results that only the item pane shows, if any."""

_CONSTANT: Final = frozenset(
    {"endpoint", "model", "attempts", "repairs", "reused", "cached_tokens", "wasted_tokens", "usd"}
)
"""Columns that are left out if all rows have the same value."""


@dataclass(slots=True)
class TableColumn:
    """A column of the table.

    Attributes:
        name: Its name in the results.
        source: ``answer``, ``input`` or ``run``.
        type: Its type.
        values: One value per row.
    """

    name: str
    source: str
    type: pa.DataType
    values: list[Any] = field(default_factory=list)

    @property
    def is_number(self) -> bool:
        """Return True if all values are numbers that JavaScript holds exactly enough."""
        kind = self.type
        if pa.types.is_integer(kind):
            return all(-_EXACT <= one <= _EXACT for one in self.values if one is not None)
        return bool(pa.types.is_floating(kind) or pa.types.is_decimal(kind))

    def has_one_value(self) -> bool:
        """Return True if all rows have the same value."""
        return all(value == self.values[0] for value in self.values)

    def to_json(self) -> dict[str, Any]:
        """Return the column as the page reads it."""
        head = {"name": shorten(self.name), "source": self.source}
        if self.source == "input" and (parsed := _parse_numbers(self.values)) is not None:
            return head | {"kind": "number", "values": parsed}
        if self.is_number:
            numbers = [
                float(v) if pa.types.is_decimal(self.type) and v is not None else v
                for v in self.values
            ]
            return head | {"kind": "number", "values": numbers}
        texts = [None if value is None else shorten(to_cell(value)) for value in self.values]
        counts = Counter(text for text in texts if text is not None)
        if len(counts) <= min(_MOST_LEVELS, max(2, len(texts) // 3)):
            levels = {text: n for n, (text, _) in enumerate(counts.most_common())}
            codes = [-1 if text is None else levels[text] for text in texts]
            return head | {"kind": "category", "levels": list(levels), "codes": codes}
        top = [pair for pair in counts.most_common(_TOP) if pair[1] > 1]
        return head | {"kind": "text", "values": texts, "distinct": len(counts), "top": top}


def _parse_numbers(values: Sequence[Any]) -> list[float | None] | None:
    """Return the numbers of a column of texts, as files without types have them; else None."""
    found = list[float | None]()
    for value in values:
        if value is None or value == "":
            found.append(None)
        elif isinstance(value, str) and len(value) < _MOST_DIGITS and _NUMBER.fullmatch(value):
            found.append(float(value))
        else:
            return None
    return found if any(value is not None for value in found) else None


@dataclass(frozen=True, slots=True)
class ReportRows:
    """The rows of a report.

    Attributes:
        total: Number of items that have ended.
        shown: Number of rows in the table.
        chosen: In words, which rows the table shows; empty if it shows all.
        flags: Number of rows by flag, over all rows.
        columns: The columns of the table.
        table: The table as compressed JSON.
        blocks: Details of the rows as compressed JSON, :data:`BLOCK_ROWS` each.
        cut: Number of rows whose prompt and reasoning are left out.
    """

    total: int
    shown: int
    chosen: tuple[str, ...]
    flags: Mapping[str, int]
    columns: tuple[TableColumn, ...]
    table: bytes
    blocks: tuple[bytes, ...]
    cut: int


def collect_rows(source: ResultSource, facts: RowFacts) -> ReportRows:
    """Read the rows of a run for its report.

    Args:
        source: The results.
        facts: Receives what is known of each row.
    """
    counts = source.journal.count_items()
    total = counts.done + counts.failed
    chosen: tuple[str, ...] = ()
    rows: Iterable[ResultRow] = source.iter_rows()
    builder = _Builder(source)
    if total > MOST_ROWS:
        for row in rows:
            facts.add(row)
        facts.mark_slow()
        numbers, words = facts.choose()
        chosen, total = tuple(words), len(facts)
        wanted = bytearray(total)
        for number in numbers:
            wanted[number] = 1
        builder.add(compress(source.iter_rows(), wanted))
        flags = bytearray(compress(facts.flags, wanted))
    else:
        builder.add(_watch(rows, facts))
        facts.mark_slow()
        flags, total = facts.flags, len(facts)
    shown = len(flags)
    columns = builder.choose_columns()
    table = {
        "rows": shown,
        "block": BLOCK_ROWS,
        "flags": list(FLAGS),
        "bits": list(flags),
        "columns": [column.to_json() for column in columns],
    }
    packed, blocks = _pack(table), builder.finish()
    counted = facts.count_flags()
    return ReportRows(total, shown, chosen, counted, columns, packed, blocks, builder.cut)


def _watch(rows: Iterable[ResultRow], facts: RowFacts) -> Iterator[ResultRow]:
    for row in rows:
        facts.add(row)
        yield row


def _pack(data: Any) -> bytes:
    return gzip.compress(orjson.dumps(data), _LEVEL, mtime=0)


class _Builder:
    """Builds the columns and the details of the rows, in parts of bounded size."""

    def __init__(self, source: ResultSource) -> None:
        self._layout = source.layout
        self._constants, self._asked = 0, set[str]()
        if source.prompts is not None and source.prompts.prompt is not None:
            self._constants = source.prompts.prompt.constants
            self._asked = list_asked_columns(source.prompts.prompt, source.layout)
        self._columns = _make_columns(source.layout)
        self._block = list[dict[str, Any]]()
        self._blocks = list[bytes]()
        self._size = self.cut = 0

    def add(self, rows: Iterable[ResultRow]) -> None:
        """Add rows in the order of the table."""
        for batch in iter_batches(self._take_details(rows), self._layout):
            for name, values in _read_batch(batch):
                if name in self._columns:
                    self._columns[name].values += values

    def _take_details(self, rows: Iterable[ResultRow]) -> Iterator[ResultRow]:
        for row in rows:
            whole = self._size < _MOST_DETAILS
            self.cut += not whole
            self._block.append(_make_details(row, self._constants, whole))
            if len(self._block) == BLOCK_ROWS:
                self._close_block()
            yield row

    def _close_block(self) -> None:
        packed = _pack(self._block)
        self._size += len(packed)
        self._blocks.append(packed)
        self._block = []

    def finish(self) -> tuple[bytes, ...]:
        """Return the details of all rows."""
        if self._block:
            self._close_block()
        return tuple(self._blocks)

    def choose_columns(self) -> tuple[TableColumn, ...]:
        """Return the columns that say something: the answer, what was asked, the other input."""
        found = [
            column
            for name, column in self._columns.items()
            if column.values
            and not (name in _CONSTANT and column.has_one_value())
            and not (column.source == "run" and not any(column.values))
            and not (column.source == "input" and column.values == self._columns["id"].values)
        ]
        order = {"key": 0, "answer": 1, "input": 2, "run": 3}
        return tuple(
            sorted(found, key=lambda one: (order[one.source], one.name not in self._asked))
        )


def _make_columns(layout: ResultLayout) -> dict[str, TableColumn]:
    """Return the empty columns of the table, by name."""
    schema, inputs = layout.to_arrow(), {column.name for column in layout.inputs}
    columns = dict[str, TableColumn]()
    for one in schema:
        if one.name == "output":
            parts = (
                [(f"output.{part.name}", part.type) for part in one.type]
                if pa.types.is_struct(one.type)
                else [("output", one.type)]
            )
            columns |= {name: TableColumn(name, "answer", kind) for name, kind in parts}
        elif one.name in inputs:
            columns[one.name] = TableColumn(one.name, "input", one.type)
        elif one.name not in _HIDDEN:
            source = "key" if one.name in {"id", "status"} else "run"
            columns[one.name] = TableColumn(one.name, source, one.type)
    return columns


def _read_batch(batch: pa.RecordBatch) -> Iterator[tuple[str, list[Any]]]:
    """Yield the columns of a batch by name, with one column per field of the answer."""
    for one in batch.schema:
        values: Any = batch.column(one.name)
        if one.name == "output" and pa.types.is_struct(one.type):
            for n, part in enumerate(values.flatten()):
                yield f"output.{one.type.field(n).name}", part.to_pylist()
        else:
            yield one.name, values.to_pylist()


def _make_details(row: ResultRow, constants: int, whole: bool) -> dict[str, Any]:
    """Return what the item pane shows of a row besides its cells."""
    found: dict[str, Any] = {
        "output": shorten_json(row.get("output")),
        "error": _shorten_recorded(row, "error"),
        "raw": _shorten_recorded(row, "raw"),
        "attempts": [
            [
                shorten(str(one.get("endpoint"))),
                one.get("start"),
                one.get("seconds"),
                shorten(str(one.get("outcome") or "no end recorded")),
            ]
            for one in row.get("attempt_log") or ()
        ],
        "usage": [
            [
                shorten(str(share.get("endpoint"))),
                share.get("requests"),
                share.get("prompt_tokens"),
                share.get("completion_tokens"),
            ]
            for share in row.get("shares") or ()
        ],
    }
    if whole:
        found["reasoning"] = _shorten_recorded(row, "reasoning")
        prompt = row.get("prompt")
        if isinstance(prompt, Sequence):
            found["prompt"] = [
                [shorten(str(one.get("role"))), shorten(to_text(one.get("content")))]
                for one in prompt[constants:]
            ]
    return {name: value for name, value in found.items() if value not in (None, [])}


def _shorten_recorded(row: ResultRow, name: str) -> str | None:
    """Return a text of a record, of which the journal may have only the beginning."""
    text, size = row.get(name), row.get(f"{name}_bytes")
    if not isinstance(text, str):
        return None
    return shorten(text, None if size is None else f"{size:,} bytes")


def describe_constants(prompt: ItemPrompt | None) -> list[tuple[str, str]]:
    """Return the messages that all items share, as the item pane shows them."""
    if prompt is None:
        return []
    fixed = prompt.messages[: prompt.constants]
    return [(role, shorten(text.parts[0])) for role, text in fixed]
