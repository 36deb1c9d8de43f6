"""Numbers, ranges, durations and tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ...backends.core.terminal import escape_controls
from ..run.forecast import Forecast, Range, RunPlan

_CENT: Final = 0.01


def format_usd_amount(amount: float) -> str:
    """Return an amount with as many digits as it deserves: ``$1,234.50``, ``$0.0032``."""
    if amount == 0 or amount >= 1:
        return f"${amount:,.2f}"
    if amount >= _CENT:
        return f"${amount:.3f}"
    return f"${amount:.2g}" if amount >= _CENT**3 else "$0.000001"


def format_duration(seconds: float) -> str:
    """Return a time in the largest units that fit: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 0.1:  # noqa: PLR2004 - a tenth of a second has digits enough
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:  # noqa: PLR2004 - below, minutes say too little
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004
    minutes = round(seconds / 60)
    if minutes < 90:  # noqa: PLR2004 - as above
        return f"{minutes} min"
    if minutes >= 48 * 60:
        return f"{seconds / 3600:,.0f} h"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_range(span: Range, write: Callable[[float], str]) -> str:
    """Return a figure with its range, or alone where the range says nothing."""
    low, likely, high = map(write, (span.low, span.likely, span.high))
    return likely if low == high else f"{low} to {high}, likely {likely}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"  # noqa: PLR2004 - two digits


def format_whole(number: float) -> str:
    """Return a whole number."""
    return f"{number:,.0f}"


def cost_lines(found: Forecast, plan: RunPlan) -> Iterator[str]:
    """Yield what a run takes: requests, tokens, dollars, time, node-hours."""
    yield f"requests: {_requests(found, plan)}"
    yield f"prompt tokens: {format_range(found.prompt, format_whole)}"
    if found.measured is None:
        most = format_whole(found.completion.high)
        at = f"answers of {plan.max_tokens:,}" + (" and every repair" if plan.repairs else "")
        yield f"completion tokens: at most {most} ({at})"
    else:
        yield f"completion tokens: {format_range(found.completion, format_whole)}"
    if found.usd is not None:
        if found.measured is None:
            low, high = map(format_usd_amount, (found.usd.low, found.usd.high))
            yield f"dollars: {low} to {high}"
        else:
            yield f"dollars: {format_range(found.usd, format_usd_amount)}"
    yield from _times(found, plan)


def _requests(found: Forecast, plan: RunPlan) -> str:
    if found.measured is not None:
        return format_range(found.requests, format_whole)
    low, high = format_whole(found.requests.low), format_whole(found.requests.high)
    return f"{low} to {high} (with every repair)" if plan.repairs else low


def _times(found: Forecast, plan: RunPlan) -> Iterator[str]:
    streams = f"{min(plan.streams, max(1, plan.items)):,} streams"
    if found.seconds is None:
        yield (
            "time: not known without a latency; 'fanfold run --pilot 20', or --like DIR "
            "of a run alike, tells it"
        )
        return
    likely, high = format_duration(found.seconds.likely), format_duration(found.seconds.high)
    yield f"time at {streams}: {likely} if latency stays as seen, {high} at most"
    if found.node_hours is not None and plan.nodes is not None:
        nodes = f"{plan.nodes:,} node{'s' if plan.nodes > 1 else ''}"
        yield f"node-hours: {format_range(found.node_hours, _hours)} on {nodes}"


def budget_lines(found: Forecast, plan: RunPlan) -> Iterator[str]:
    """Yield whether the budget carries the run."""
    if not plan.caps.has_any:
        yield "budget: none"
        return
    for cap in found.unknown_limits:
        yield f"budget.{cap}: nothing can be said yet ({_missing(cap)})"
    if found.budget_reach is not None:
        yield f"budget: {format_budget_reach(found)}"


def _missing(cap: str) -> str:
    needs = {"usd": "node-hours need a time", "node_hours": "it needs a time, and the nodes"}
    return needs.get(cap, "nothing is known of it")


def format_budget_reach(found: Forecast) -> str:
    """Return how far the budget reaches, in words; there must be one."""
    assert found.budget_reach is not None
    cap, worst, share = (
        found.budget_reach.limit,
        found.budget_reach.worst_limit,
        found.budget_reach.share,
    )
    name, binds = f"budget.{cap}", f"budget.{cap} binds"
    binds += f", at worst budget.{worst}" if worst != cap else ""
    if share.low >= 1:
        spare = 100 / share.low
        return f"carries all items; {name} is nearest, {spare:.0f} % of it at most are needed"
    low, likely, high = (_percent(value) for value in (share.low, share.likely, share.high))
    if found.measured is None:
        if share.high < 1:
            return f"carries {low} to {high} % of the items; {binds}"
        return f"carries at least {low} % of the items, all of them if answers are short; {binds}"
    if share.likely >= 1:
        return f"likely carries all items, at least {low} %; {name} is nearest"
    span = "" if low == high else f" ({low} to {high} %)"
    return f"carries about {likely} % of the items{span}; {binds}"


def _percent(share: float) -> str:
    """Return a share in per cent, never rounded up to all."""
    if share >= 1:
        return "100"
    value = min(99.0, 100 * share)
    return f"{value:.0f}" if value >= 1 else f"{value:.1g}"


_CELL: Final = 80
_NARROW: Final = 6
_FRAME: Final = 3
_HIDDEN: Final = frozenset({"op", "field", "k", "order"})


def format_cell(value: Any) -> Text:
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
        field = format_cell(stage.get("field")).plain
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
        table.add_row(format_cell(name), format_cell(value))
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
    return " to ".join(format_cell(name).plain for name in names), value


def _ranking(stage: Mapping[str, Any], width: int) -> Iterator[Table | Text]:
    """Show one row per item: short columns whole, long ones cut, those without room named."""
    flat = [_flatten_row(row, stage.get("field")) for row in stage["rows"]]
    names = list(dict.fromkeys(name for row in flat for name in row))
    heads = [format_cell(name) for name in names]
    cells = [[format_cell(row.get(name)) for row in flat] for name in names]
    wide = [max(map(len, (head, *column))) for head, column in zip(heads, cells, strict=True)]
    room = fit_columns(wide, width)
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


def fit_columns(wide: Sequence[int], width: int) -> list[int]:
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


def _flatten_row(row: Mapping[str, Any], field: str | None) -> dict[str, Any]:
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
