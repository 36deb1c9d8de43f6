"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...backends.core.terminal import count_nouns, escape_controls
from ..run.console import describe_other_groups, name_aggregate_values
from ..run.rich_console import print_line

_CELL: Final = 80
_LEAST_TEXT: Final = 20
"""Characters below which a column of text says too little to be shown."""
_FRAME: Final = 3
"""Characters that the frame of a column takes."""
_GAP: Final = 2
"""Blanks between columns without a frame."""
_HIDDEN: Final = frozenset({"op", "field", "k", "order"})


def format_cell(value: Any, most: int | None = _CELL) -> Text:
    """Return a value as a table cell: one line, truncated, no markup or control characters.

    Args:
        value: The value.
        most: Maximum number of characters; None for all.
    """
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, str):
        text = value
    else:
        text = "" if value is None else orjson.dumps(value).decode()
    text = escape_controls(" ".join(text.split()))
    return Text(text if most is None or len(text) <= most else text[: most - 1] + "…")


def show_aggregate(aggregate: list[dict[str, Any]], simulated: bool, console: Console) -> None:
    """Print one table per aggregator, marked if the answers are simulated."""
    for stage in map(name_aggregate_values, aggregate):
        title = str(stage["op"])
        for word, key in (("of", "field"), ("by", "group_by")):
            if name := format_cell(stage.get(key)).plain:
                title += f" {word} {name}"
        for key in ("query", "function"):
            if name := format_cell(stage.get(key)).plain:
                title += f": {name}"
        mark = "   simulated: true" if simulated else ""
        print_line(console, f"{title}{mark}", "bold")
        for part in _tables(stage, console.width):
            console.print(part)


def _tables(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    if "error" in stage:
        yield Text(f"failed: {format_cell(stage['error'], most=None).plain}", style="red")
    elif stage["op"] in ("sql", "python"):
        yield from _final_result(stage, width)
    elif isinstance(stage.get("groups"), list):
        yield from _groups(stage, width)
    elif not isinstance(stage.get("rows"), list):
        yield _facts(stage)
    elif stage["rows"]:
        yield from _ranking(stage, width)
    else:
        yield Text("no rows", style="italic")


def _final_result(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    """Yield the rows of a query or a function, or what else the function returned."""
    found = stage["rows"] if stage["op"] == "sql" else stage["result"]
    if isinstance(found, Mapping) and found:
        yield _facts(found, hidden=())
    elif isinstance(found, list) and found and all(isinstance(row, Mapping) for row in found):
        names = dict.fromkeys(name for row in found for name in row)
        yield from make_table(
            [
                Column(
                    name,
                    [row.get(name) for row in found],
                    is_key=n == 0,
                    is_number=all(isinstance(row.get(name, 0), int | float) for row in found),
                )
                for n, name in enumerate(names)
            ],
            width,
        )
    else:
        yield format_cell(found) if found else Text("no rows", style="italic")
    if stage.get("more"):
        yield Text(f"the first {count_nouns(len(found), 'row')} (limit)", style="italic")


def _groups(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    """Yield one row per group, or per row of a group."""
    field, by = stage.get("field"), str(stage["group_by"])
    flat = list[dict[str, Any]]()
    for group in stage["groups"]:
        head = {by: "null" if group["group"] is None else group["group"], "size": group["size"]}
        facts = {k: v for k, v in group.items() if k not in ("group", "size", "rows")}
        if isinstance(group.get("rows"), list):
            flat += [{**_flatten_row(row, field), **head} for row in group["rows"]]
        else:
            if "quantiles" in facts:  # a short name, so that few tables are needed
                facts["q"] = facts.pop("quantiles")
            pairs = {format_cell(name).plain: value for name, value in _pairs(facts)}
            flat.append({**pairs, **head})
    names = dict.fromkeys([by, "size", *(name for row in flat for name in row)])
    has_rows = any(isinstance(group.get("rows"), list) for group in stage["groups"])
    if flat:
        yield from make_table(
            [
                Column(
                    name,
                    [row.get(name) for row in flat],
                    is_key=name in {by, "rank", "id", field},
                    is_number=all(isinstance(row.get(name, 0), int | float) for row in flat),
                )
                for name in names
            ],
            width,
            splits=not has_rows,
        )
    else:
        yield Text("no groups", style="italic")
    if others := describe_other_groups(stage):
        yield Text(f"{others} (max_groups)", style="italic")


def _facts(stage: Mapping[str, Any], hidden: Collection[str] = _HIDDEN) -> Table:
    """Return a table with one name and value per row."""
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in _pairs(stage, hidden):
        table.add_row(format_cell(name), format_cell(value))
    return table


def _pairs(
    stage: Mapping[str, Any], hidden: Collection[str] = _HIDDEN
) -> Iterator[tuple[str, Any]]:
    for key, value in stage.items():
        if key in hidden:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key} {name}", inner) for name, inner in value.items())
        elif isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
            yield from (_pair(v) for v in value)
        else:
            yield key, value


def _pair(entry: Mapping[str, Any]) -> tuple[str, Any]:
    *names, value = entry.values()
    return " to ".join(format_cell(name).plain for name in names), value


def _ranking(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    """Yield one row per item; rank, id and value are never shortened."""
    field = stage.get("field")
    flat = [_flatten_row(row, field) for row in stage["rows"]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    yield from make_table(
        [
            Column(
                name,
                [row.get(name) for row in flat],
                is_key=name in {"rank", "id", field},
                is_number=all(isinstance(row.get(name), int | float) for row in flat),
            )
            for name in names
        ],
        width,
    )


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        head: Its name.
        cells: Its values.
        is_key: Whether it identifies a row; such a column is always shown, and never shortened.
        is_number: Whether its values are numbers, which are shown whole or not at all.
    """

    head: str
    cells: Sequence[Any]
    is_key: bool = False
    is_number: bool = False


def make_table(
    columns: Sequence[Column], width: int, *, framed: bool = True, splits: bool = False
) -> Iterator[Table | Text]:
    """Yield a table that fits a width, and a line that names the columns without room.

    Columns of text are shortened to some extent, and long names are wrapped. What does not fit
    even then is left out, the last columns first.

    Args:
        columns: The columns, the most important first.
        width: Width of the terminal.
        framed: Whether lines are drawn around the cells.
        splits: Whether columns without room follow in further tables, below the same keys.
    """
    while True:
        table, left = _make_part(columns, width, framed)
        yield table
        keys = [column for column in columns if column.is_key]
        if not splits or not left or len(left) + len(keys) == len(columns):
            break
        columns = [*keys, *left]
    if left:
        names = ", ".join(format_cell(column.head).plain for column in left)
        yield Text(f"columns not shown: {names}")


def _make_part(columns: Sequence[Column], width: int, framed: bool) -> tuple[Table, list[Column]]:
    """Return a table of the columns that fit, and the other columns."""
    heads = [format_cell(column.head) for column in columns]
    cells = [
        [format_cell(value, None if column.is_key else _CELL) for value in column.cells]
        for column in columns
    ]
    wide = [  # a column without a name and cells has a width too
        max(1, *map(len, (head, *texts))) for head, texts in zip(heads, cells, strict=True)
    ]
    least = [
        most if column.is_key else max(1, _least_head(head), _least_cells(column, texts))
        for column, head, texts, most in zip(columns, heads, cells, wide, strict=True)
    ]
    keys = [column.is_key for column in columns]
    gap, edge = (_FRAME, 1) if framed else (_GAP, -_GAP)
    widths = fit_columns(wide, least, keys, width - edge, gap)
    shown = [n for n, most in enumerate(widths) if most]
    table = Table() if framed else Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for n in shown:
        head = heads[n].copy()
        head.no_wrap = False
        table.add_column(
            head,
            width=widths[n],
            no_wrap=not keys[n],
            overflow="fold" if keys[n] else "ellipsis",
            justify="right" if columns[n].is_number else "left",
        )
    for row in zip(*(cells[n] for n in shown), strict=True):
        table.add_row(*row)
    return table, [column for n, column in enumerate(columns) if n not in shown]


def _least_head(head: Text) -> int:
    """Return the width that the name of a column needs; a long one is wrapped at its blanks."""
    return len(head) if len(head) <= _LEAST_TEXT else max(map(len, head.plain.split()), default=0)


def _least_cells(column: Column, texts: Sequence[Text]) -> int:
    most = max(map(len, texts), default=0)
    return most if column.is_number else min(most, _LEAST_TEXT)


def fit_columns(
    wide: Sequence[int], least: Sequence[int], keys: Sequence[bool], width: int, gap: int
) -> list[int]:
    """Return the widths of columns in a table; 0 for columns without room.

    Args:
        wide: Preferred width of each column, in characters.
        least: The width below which a column is left out.
        keys: Whether a column is shown in any case; the widest are folded if need be.
        width: Width of all columns together.
        gap: Further characters that a column takes.
    """
    widths = [low if key else 0 for low, key in zip(least, keys, strict=True)]
    free = width - sum(low + gap for low in widths if low)
    while free < 0 and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
        free += 1
    for n, low in enumerate(least):
        if not keys[n] and low + gap <= free:
            widths[n], free = low, free - low - gap
    while free > 0 and (short := [n for n, w in enumerate(widths) if 0 < w < wide[n]]):
        narrowest = min(short, key=widths.__getitem__)
        widths[narrowest], free = widths[narrowest] + 1, free - 1
    return widths


def _flatten_row(row: Mapping[str, Any], field: str | None) -> dict[str, Any]:
    """Merge the row's columns and the answer's fields with rank, id and value."""
    flat = {key: row[key] for key in ("rank", "id") if key in row}
    if field is not None and "value" in row:
        flat[field] = row["value"]
    for source, part in (("input", row.get("show")), ("output", row.get("output"))):
        for name, inner in part.items() if isinstance(part, Mapping) else ():
            if name not in flat:
                flat[name] = inner
            elif (source, name) not in {("input", "id"), ("output", field)}:  # the same value
                flat[f"{source}.{name}"] = inner
    if not isinstance(row.get("output"), Mapping) and row.get("output") is not None:
        flat["output"] = row["output"]
    return flat
