"""The aggregate as tables, and what a run says when it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CELL: Final = 60


def cell(value: Any) -> Text:
    """Return a value fit for a table: no markup, no control characters, cut to one line."""
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
        table = _table(stage)
        table.title = _title(stage)
        table.caption = "simulated: true" if simulated else None
        console.print(table)


def _title(stage: Mapping[str, Any]) -> str:
    field = stage.get("field")
    return f"{stage['op']} of {field}" if field else str(stage["op"])


def _table(stage: Mapping[str, Any]) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    rows = stage.get("rows")
    if isinstance(rows, list):
        return _row_table(table, rows)
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in stage.items():
        if key in ("op", "field"):
            continue
        if isinstance(value, Mapping):
            for name, inner in value.items():
                table.add_row(cell(str(name)), cell(inner))
        else:
            table.add_row(cell(key), cell(value))
    return table


def _row_table(table: Table, rows: list[dict[str, Any]]) -> Table:
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    for name in columns:
        table.add_column(cell(name), overflow="fold")
    for row in flat:
        table.add_row(*(cell(row.get(name)) for name in columns))
    return table


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the answer's fields beside rank, id and value."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key in ("output", "show") and isinstance(value, Mapping):
            flat |= {name: inner for name, inner in value.items() if name not in flat}
        else:
            flat[key] = value
    return flat
