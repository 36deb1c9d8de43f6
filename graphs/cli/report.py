"""The aggregate as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ...backends.core.terminal import escape_controls

_CELL: Final = 80
_NARROW: Final = 6
_FRAME: Final = 3
_HIDDEN: Final = frozenset({"op", "field", "k", "order"})


def cell(value: Any) -> Text:
    """Return a value fit for a table: no markup, no control characters, one line, cut."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, str):
        text = value
    else:
        text = "" if value is None else orjson.dumps(value).decode()
    text = escape_controls(" ".join(text.split()))
    return Text(text if len(text) <= _CELL else text[: _CELL - 1] + "…")


def show_aggregate(aggregate: list[dict[str, Any]], simulated: bool, console: Console) -> None:
    """Print one table per reduce stage; a simulated one says so."""
    for stage in aggregate:
        field = cell(stage.get("field")).plain
        title = f"{stage['op']} of {field}" if field else str(stage["op"])
        mark = "   simulated: true" if simulated else ""
        console.print(Text(f"{title}{mark}", style="bold"), soft_wrap=True)
        for part in _tables(stage, console.width):
            console.print(part)


def _tables(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    if not isinstance(stage.get("rows"), list):
        yield _facts(stage)
    elif stage["rows"]:
        yield from _ranking(stage, width)
    else:
        yield Text("no rows", style="italic")


def _facts(stage: Mapping[str, Any]) -> Table:
    """Show names and values below each other."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value in _pairs(stage):
        table.add_row(cell(name), cell(value))
    return table


def _pairs(stage: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in stage.items():
        if key in _HIDDEN:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key} {name}", inner) for name, inner in value.items())
        elif isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
            yield from (_pair(v) for v in value)
        else:
            yield key, value


def _pair(entry: Mapping[str, Any]) -> tuple[str, Any]:
    *names, value = entry.values()
    return " to ".join(cell(name).plain for name in names), value


def _ranking(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    """Show one row per item: short columns whole, long ones cut, those without room named."""
    flat = [_flat(row, stage.get("field")) for row in stage["rows"]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    heads = [cell(name) for name in names]
    cells = [[cell(row.get(name)) for row in flat] for name in names]
    wide = [max(map(len, (head, *column))) for head, column in zip(heads, cells, strict=True)]
    room = fit(wide, width)
    table = Table()
    for name, head, most in zip(names, heads, room, strict=False):
        numeric = all(isinstance(row.get(name), int | float) for row in flat)
        justify: JustifyMethod = "right" if numeric else "left"
        table.add_column(head, width=most, no_wrap=True, overflow="ellipsis", justify=justify)
    for row in zip(*cells[: len(room)], strict=True):
        table.add_row(*row)
    yield table
    if len(room) < len(names):
        yield Text(f"no room for {', '.join(h.plain for h in heads[len(room) :])}")


def fit(wide: Sequence[int], width: int) -> list[int]:
    """Return the columns' widths in a table: the widest give way first.

    Args:
        wide: Characters that each column would like.
        width: Characters of the whole table; a column's frame takes 3, the last edge 1.

    Returns:
        One width per column; fewer than asked for when not even narrow ones have room.
    """
    if sum(wide) + _FRAME * len(wide) < width:
        return list(wide)
    shown = max(1, min(len(wide), (width - 1) // (_NARROW + _FRAME)))
    room, free = list(wide[:shown]), width - 1 - _FRAME * shown
    while sum(room) > free and max(room) > 1:
        most = max(room)
        next_most = max((w for w in room if w < most), default=1)
        many = room.count(most)
        least = max(next_most, most - -(-(sum(room) - free) // many))
        room = [least if w == most else w for w in room]
    return room


def _flat(row: Mapping[str, Any], field: str | None) -> dict[str, Any]:
    """Lay the row's columns and the answer's fields beside rank, id and value."""
    flat = {key: row[key] for key in ("rank", "id") if key in row}
    if field is not None and "value" in row:
        flat[field] = row["value"]
    for part in (row.get("show"), row.get("output")):
        if isinstance(part, Mapping):
            flat |= {name: inner for name, inner in part.items() if name not in flat}
    if not isinstance(row.get("output"), Mapping) and row.get("output") is not None:
        flat["output"] = row["output"]
    return flat
