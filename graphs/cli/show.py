"""``fanfold show``: rows of the results as a table, with selected columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from heapq import nlargest, nsmallest
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from ...backends.core.errors import ConfigurationError
from ...backends.core.fields import FieldPath, split_column
from ...backends.core.templates import ItemPrompt
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json
from ...backends.storage.results import ResultLayout
from ...backends.storage.results_schema import INPUT_ROW, ResultRow
from ...backends.storage.run_folder import RunFolder, open_folder
from ...configs.evaluation import read_number
from ...configs.raw_settings import read_settings
from ..run.console import print_json, print_messages
from ..run.result_rows import list_asked_columns, open_result_source
from ..run.rich_console import Terminal
from .tables import Column, make_table

_ID: Final = "id"
_OPTIONAL: Final = ("prompt",)
_MOST_NAMES: Final = 40
"""Names that a message lists."""

_GENERATED: Final = re.compile(r"(?:input\.)?(?:unnamed_\d+|Unnamed: \d+|__index_level_\d+__)")
"""Names of columns without a name: of fanfold's reader of CSV files, and of pandas."""

_Cell: TypeAlias = Callable[[ResultRow], Json]


def show_rows(  # noqa: PLR0913, PLR0917 - one for each option of the command
    path: Path,
    columns: str | None,
    status: str | None,
    limit: int,
    as_json: bool,
    sort: str | None = None,
) -> None:
    """Show rows of the results so far.

    Args:
        path: The run folder.
        columns: Names of columns, separated by commas; None shows the answer and the input.
        status: ``done`` or ``failed``; None for both.
        limit: Number of rows.
        as_json: Print JSON instead of a table.
        sort: Column by which the rows are sorted, with ``-`` before it from the highest value to
            the lowest; None keeps the order of the input.

    Raises:
        ConfigurationError: The folder is no run folder, or has no such column.
        JournalError: The journal or the items are damaged.
    """
    folder = open_folder(path)
    about = folder.read_provenance()
    names = None if columns is None else [name.strip() for name in columns.split(",")]
    optional = [name for name in _OPTIONAL if names is not None and name in names]
    with open_result_source(folder, optional) as source:
        chosen = names or _default_names(source.layout, status, _list_asked(folder, source.layout))
        cells = {name: _find_column(name, source.layout) for name in (_ID, *chosen)}
        ordered: Iterable[ResultRow] = source.iter_rows(status)
        if sort is not None:
            key = sort.removeprefix("-")
            by = _find_column(key, source.layout, "--sort")
            same = key.removeprefix("output.") if names is None else key
            others = {name: cell for name, cell in cells.items() if name != same}
            cells = {_ID: cells[_ID], key: by} | others
            ordered = _sort_rows(ordered, by, limit + 1, descending=sort != key)
        found = list(islice(ordered, limit + 1))
    rows = [{name: cell(row) for name, cell in cells.items()} for row in found[:limit]]
    if names is None and not as_json:
        shown = [name for name in cells if name == _ID or not _is_repeated(name, rows)]
        cells = {name: cells[name] for name in shown}
    if as_json:
        print_json({"run": about["run"], "simulated": about["simulated"], "rows": rows})
        return
    if about["simulated"]:
        print_messages(["SIMULATED: the answers come from no language model"])
    console = Terminal()
    for part in make_table([_make_column(name, rows) for name in cells], console.width):
        console.print(part)
    if len(found) > limit:
        print_messages(
            [
                f"the first {count_nouns(limit, 'row')}; more with --limit N, all with: "
                f"fanfold results {path}"
            ]
        )


def _make_column(name: str, rows: Sequence[dict[str, Json]]) -> Column:
    values = [row[name] for row in rows]
    numeric = all(isinstance(value, int | float) for value in values if value is not None)
    return Column(name, values, is_key=name == _ID, is_number=numeric and bool(values))


def _list_asked(folder: RunFolder, layout: ResultLayout) -> set[str]:
    """Return the columns of the results that the prompt of a run shows."""
    task = read_settings(folder.settings).data.get("task")
    if not isinstance(task, Mapping) or not (task.get("prompt") or task.get("messages")):
        return set()
    return list_asked_columns(ItemPrompt.parse(task), layout)


def _default_names(layout: ResultLayout, status: str | None, asked: Container[str]) -> list[str]:
    """Return the columns of answer and input, those of the prompt first, or of the errors."""
    if status == "failed":
        return ["error_class", "error"]
    taken = {*layout.head, *layout.tail, *layout.input_names().values()}
    parts = [name for name, _ in layout.output.parts] if layout.output.kind == "struct" else []
    answer = [f"output.{name}" if name in taken else name for name in parts]
    agreement = list[str]()
    if (shape := layout.further.get("agreement")) is not None:
        votes = [f"agreement.{name}" for name, _ in shape.parts]
        agreement = votes if shape.kind == "struct" else ["agreement"]
    inputs = sorted(layout.input_names().values(), key=lambda name: name not in asked)
    return ["status", *(answer or ["output"]), *agreement, *inputs]


def _is_repeated(name: str, rows: Sequence[dict[str, Json]]) -> bool:
    """Return True for a column whose name the reader made up, or that repeats the ids."""
    if _GENERATED.fullmatch(name):
        return True
    return bool(rows) and all(str(row[name]) == row[_ID] for row in rows)


def _sort_rows(
    rows: Iterable[ResultRow], by: _Cell, count: int, *, descending: bool
) -> list[ResultRow]:
    """Return the first rows by a column: numbers, texts, other values, and last what is missing."""
    sign = -1 if descending else 1

    def rank(row: ResultRow) -> tuple[int, Any]:
        value = by(row)
        number = float(value) if isinstance(value, bool) else read_number(value)
        if number is not None:
            return 0, number
        if value is None or value == "" or isinstance(value, float):  # not a finite number
            return 3 * sign, 0
        return (sign, value) if isinstance(value, str) else (2 * sign, orjson.dumps(value))

    return (nlargest if descending else nsmallest)(count, rows, rank)


def _find_column(name: str, layout: ResultLayout, option: str = "--columns") -> _Cell:
    """Return the function that reads a column from a row.

    Args:
        name: Its name.
        layout: The columns of the results.
        option: The option that names it, for messages.

    Raises:
        ConfigurationError: The results have no such column.
    """
    if name in (*layout.head, *layout.tail, "output"):
        return lambda row: row.get(name)
    sources = {column: source for source, column in layout.input_names().items()}
    if name in sources:
        return lambda row: row[INPUT_ROW].get(sources[name])
    first, *keys = name.split(".")
    if keys and first in layout.further:
        further = FieldPath("output", tuple(keys))
        return lambda row: further.pick(row.get(first), {})
    path = FieldPath.parse(name)
    is_known = (
        split_column(".".join(path.keys), layout.input_names()) is not None
        if path.source == "input"
        else layout.output.kind not in {"struct", "free"}
        or path.keys[:1] in {(part,) for part, _ in layout.output.parts}
    )
    if is_known and path.keys:
        return lambda row: path.pick(row.get("output"), row[INPUT_ROW])
    known = [
        *layout.head,
        "output",
        *(f"output.{part}" for part, _ in layout.output.parts if layout.output.kind == "struct"),
        *sources,
        *layout.tail,
        *_OPTIONAL,
    ]
    known = list(dict.fromkeys(known))
    short = [one.rpartition(".")[2] for one in known]
    close = get_close_matches(name, [*known, *short], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(known[:_MOST_NAMES]) + (", …" if len(known) > _MOST_NAMES else "")
    raise ConfigurationError(f"{option}: no column {name!r} (there are {listed}){hint}")
