"""The aggregate as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CELL: Final = 80
_SHORT: Final = 14
_HIDDEN: Final = frozenset({"op", "field", "k", "order"})


def cell(value: Any) -> Text:
    """Return a value fit for a table: no markup, no control characters, one line, cut."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, str):
        text = value
    else:
        text = "" if value is None else orjson.dumps(value).decode()
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    return Text(text if len(text) <= _CELL else text[: _CELL - 1] + "…")


def show_aggregate(aggregate: list[dict[str, Any]], simulated: bool, console: Console) -> None:
    """Print one table per reduce stage; a simulated one says so."""
    for stage in aggregate:
        table = _ranking(stage) if isinstance(stage.get("rows"), list) else _facts(stage)
        field = stage.get("field")
        table.title = f"{stage['op']} of {field}" if field else str(stage["op"])
        table.caption = "simulated: true" if simulated else None
        console.print(table)


def _facts(stage: Mapping[str, Any]) -> Table:
    """Show names and values below each other."""
    table = Table(title_justify="left", caption_justify="left", show_header=False)
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


def _ranking(stage: Mapping[str, Any]) -> Table:
    """Show one row per item, the short columns whole, the long ones cut."""
    table = Table(title_justify="left", caption_justify="left")
    flat = [_flat(row, stage.get("field")) for row in stage["rows"]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    cells = [[cell(row.get(name)) for name in columns] for row in flat]
    for n, name in enumerate(columns):
        widest = max([len(name), *(len(row[n]) for row in cells)])
        width = min(widest, _SHORT)
        table.add_column(cell(name), no_wrap=True, overflow="ellipsis", min_width=width)
    for row in cells:
        table.add_row(*row)
    return table


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
