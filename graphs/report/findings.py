"""The finding of a run: its aggregate, and distributions of the answer's fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10
from typing import Any, Final

import pyarrow as pa
from markupsafe import Markup

from ...backends.core.terminal import count_nouns
from ..run.console import describe_other_groups, name_aggregate_values
from .charts import Charts
from .molecules import SMILES_NAMES, DrawMolecule
from .rows import TableColumn
from .texts import NONE, shorten, to_cell, to_text

_DRAWN: Final = 8
"""Molecules of a ranking that are drawn."""

_MOST_BARS: Final = 12
_MOST_ROWS: Final = 100
_BINS: Final = 24
_MOST_FIELDS: Final = 6
_ORDER: Final = {"top_k": 0, "count": 2}
"""Rankings come first; counts come last, because the head of the page has them."""


@dataclass(frozen=True, slots=True)
class Card:
    """A molecule of a ranking; ``reason`` says why it has its rank, if the model was asked."""

    rank: int
    id: str
    value: str
    svg: Markup
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of the finding.

    Attributes:
        title: What it is.
        note: One line about it.
        svg: Its chart.
        cards: Molecules.
        head: Names of the columns of its table.
        rows: The table.
        numbers: Which columns are numbers.
        is_open: Whether the table is shown at once; else it can be opened.
        is_wide: Whether it takes the whole width.
    """

    title: str
    note: str = ""
    svg: Markup | None = None
    cards: Sequence[Card] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: Sequence[bool] = ()
    is_open: bool = True
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class FindingMaker:
    """Makes the findings of a run.

    Attributes:
        charts: Draws charts; None leaves tables.
        draw: Draws molecules, or None.
        smiles: Names of the columns that contain SMILES.
        columns: Columns of the table by name, if it shows all rows.
    """

    charts: Charts | None
    draw: DrawMolecule | None
    smiles: frozenset[str] = SMILES_NAMES
    columns: Mapping[str, TableColumn] = field(default_factory=dict)

    def make(self, aggregate: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
        """Yield the finding: the aggregate, then other fields of the answer."""
        seen = set[str]()
        entries = sorted(aggregate, key=lambda one: _ORDER.get(str(one.get("op")), 1))
        for entry in map(name_aggregate_values, entries):
            groups = entry.get("groups")
            if "group_by" in entry and isinstance(groups, list):
                yield self._make_groups(entry, groups)
            elif (listed := _list_rows(entry)) is not None:
                yield self._make_table(entry, listed)
            elif entry.get("op") == "agreement" and "agreement" in entry:
                yield _make_agreement(entry)
            else:
                yield self._make_entry(entry)
            if entry.get("op") in {"histogram", "stats"}:
                seen.add(str(entry.get("field")))
        others = [
            column
            for column in self.columns.values()
            if column.source == "answer" and column.name.removeprefix("output.") not in seen
        ]
        yield from [found for one in others if (found := self._describe(one))][:_MOST_FIELDS]

    def _make_entry(self, entry: Mapping[str, Any]) -> Finding:
        match entry:
            case {"op": "top_k", "rows": [*rows]}:
                return self._make_ranking(entry, rows)
            case {"op": "histogram", "counts": [*counts]}:
                pairs = [(to_text(one["value"]), int(one["count"])) for one in counts]
                return self._make_counts(_title(entry), pairs, entry.get("missing"))
            case {"op": "histogram", "bins": [*bins]}:
                found = [(one["low"], one["high"], one["count"]) for one in bins]
                outside = sum(int(entry.get(name) or 0) for name in ("under", "over"))
                note = f"{outside:,} outside the bins; " if outside else ""
                return self._make_bins(_title(entry), found, note + _missing(entry.get("missing")))
            case {"op": "collect", "rows": [*rows]}:
                return self._make_list(entry, rows)
            case {"op": "stats", "quantiles": _}:
                return self._make_stats(entry)
        rows = [[shorten(name), _format(value)] for name, value in _flatten(entry)][:_MOST_ROWS]
        return Finding(_title(entry), head=("", "value"), rows=rows, numbers=(False, True))

    def _make_table(self, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Finding:
        note = "the first rows" if entry.get("more") else ""
        head = list(dict.fromkeys(str(name) for row in rows for name in row))
        numbers = [all(_is_number(row.get(name, 0)) for row in rows) for name in head]
        cells = [[_format(row.get(name)) for name in head] for row in rows[:_MOST_ROWS]]
        return Finding(_title(entry), note, None, (), list(map(shorten, head)), cells, numbers)

    def draw_row(self, row: Mapping[str, Any]) -> Markup | None:
        """Return the molecule of the columns of an item; None if there is none to draw."""
        text = next((v for k, v in row.items() if k.casefold() in self.smiles), None)
        return None if self.draw is None else self.draw(text)

    def _make_ranking(self, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Finding:
        cards = list[Card]()
        for row in rows[:_DRAWN] if self.draw else ():
            shown = {**row.get("show", {}), "id": row.get("id")}
            if svg := self.draw_row(shown):
                value = _format(row.get("value"))
                cards.append(Card(int(row["rank"]), shorten(str(row["id"])), value, svg))
        field_name = str(entry["field"])
        flat = [_flatten_row(row, field_name) for row in rows[:_MOST_ROWS]]
        head = list(dict.fromkeys(name for row in flat for name in row))
        numbers = [all(_is_number(row.get(name)) for row in flat) for name in head]
        cells = [[_format(row.get(name)) for name in head] for row in flat]
        note = _missing(entry.get("missing"))
        if not rows:
            note = "no item has a usable value"
        return Finding(_title(entry), note, None, cards, list(map(shorten, head)), cells, numbers)

    def _make_groups(
        self, entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> Finding:
        """Return an aggregator by groups: a table with a row per group, or per row of a group."""
        flat = [row for one in groups for row in _flatten_group(one, str(entry.get("field")))]
        head = list(dict.fromkeys(name for row in flat[:_MOST_ROWS] for name in row))
        cells = [[_format(row.get(name)) for name in head] for row in flat[:_MOST_ROWS]]
        numbers = [
            name != "group" and all(_is_number(row.get(name, 0)) for row in flat) for name in head
        ]
        notes = [f"the first {_MOST_ROWS:,} of {len(flat):,} rows"] * (len(flat) > _MOST_ROWS)
        if others := describe_other_groups(entry):
            notes.append(others)
        title, svg = _title(entry), None
        ranges = [found for one in groups if (found := _find_range(one))][:_MOST_BARS]
        if self.charts and ranges:
            notes.append("the picture has the median and the middle half of each group")
            low = min(one[2] for one in ranges)
            high = max(one[3] for one in ranges)
            svg = self.charts.draw_intervals(ranges, title, (low, high))
        note = "; ".join(notes)
        is_open = svg is None
        return Finding(title, note, svg, (), list(map(shorten, head)), cells, numbers, is_open)

    def _make_list(self, entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Finding:
        head = list(dict.fromkeys(str(name) for row in rows[:_MOST_ROWS] for name in row))
        cells = [[_format(row.get(name)) for name in head] for row in rows[:_MOST_ROWS]]
        more = len(rows) - _MOST_ROWS
        note = (
            f"the first {_MOST_ROWS:,} of {len(rows):,}"
            if more > 0
            else count_nouns(len(rows), "row")
        )
        numbers = [all(_is_number(row.get(name)) for row in rows) for name in head]
        return Finding(
            _title(entry), note, None, (), list(map(shorten, head)), cells, numbers, False
        )

    def _make_counts(
        self, title: str, counts: Sequence[tuple[str, int]], missing: object = None
    ) -> Finding:
        shown, note = list(counts[:_MOST_BARS]), _missing(missing)
        if rest := sum(count for _, count in counts[_MOST_BARS:]):
            shown.append((f"{len(counts) - _MOST_BARS:,} other values", rest))
        rows = [[shorten(name), f"{count:,}"] for name, count in counts[:_MOST_ROWS]]
        svg = self.charts.draw_counts(shown, title) if self.charts and shown else None
        head = ("value", "items")
        return Finding(title, note, svg, (), head, rows, (False, True), svg is None)

    def _make_bins(
        self, title: str, bins: Sequence[tuple[float, float, int]], note: str = ""
    ) -> Finding:
        rows = [[f"{_format(low)} to {_format(high)}", f"{n:,}"] for low, high, n in bins]
        svg = self.charts.draw_histogram(bins, title) if self.charts and bins else None
        return Finding(title, note, svg, (), ("range", "items"), rows, (False, True), svg is None)

    def _make_stats(self, entry: Mapping[str, Any]) -> Finding:
        facts = {name: entry.get(name) for name in ("count", "mean", "sd", "min", "max")}
        given = entry.get("quantiles") or {}
        rows = [[name, _format(value)] for name, value in facts.items()]
        rows += [[f"quantile {q}", _format(value)] for q, value in given.items()]
        named = {**facts, "median": given.get("0.5")}
        main = [
            f"{name} {_format(named[name])}"
            for name in ("mean", "sd", "median", "min", "max")
            if named[name] is not None
        ]
        column = self.columns.get(_column_name(str(entry.get("field"))))
        svg = None
        if self.charts and column is not None and (bins := _count_bins(column.values)):
            svg = self.charts.draw_histogram(bins, _title(entry))
        notes = [", ".join(main), entry.get("note"), _missing(entry.get("missing"))]
        note = "; ".join(filter(None, notes))
        numbers = (False, True)
        return Finding(_title(entry), note, svg, (), ("", "value"), rows, numbers, svg is None)

    def _describe(self, column: TableColumn) -> Finding | None:
        """Return the distribution of a field of the answer; None if it says nothing."""
        if pa.types.is_nested(column.type):  # JSON is no value to count
            return None
        known = [value for value in column.values if value is not None]
        title = f"Distribution of {shorten(column.name.removeprefix('output.'))}"
        missing = len(column.values) - len(known)
        if not known:
            return None
        if column.is_number:
            bins = _count_bins(known)
            return self._make_bins(title, bins, _missing(missing)) if bins else None
        counts = Counter(to_text(value) for value in known)
        if len(counts) > min(50, max(2, len(known) // 4)):
            return None
        return self._make_counts(title, counts.most_common(), missing)


def _make_agreement(entry: Mapping[str, Any]) -> Finding:
    """Return the agreement of samples: a row for each field, or one for a whole answer."""
    by_field = {name: value for name, value in entry.items() if isinstance(value, Mapping)}
    fields = dict.fromkeys(str(field) for one in by_field.values() for field in one)
    rows = [
        [shorten(field), *(_format(one.get(field)) for one in by_field.values())]
        for field in fields
    ]
    counts = [
        f"{value:,} {name.replace('_', ' ')}" for name, value in entry.items() if _is_number(value)
    ]
    numbers = (False, *[True] * len(by_field))
    head = ("field", *by_field)
    return Finding("Agreement of samples", ", ".join(counts), None, (), head, rows, numbers)


def _flatten_group(group: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a group as cells by column."""
    head = {"group": group.get("group"), "size": group.get("size")}
    if isinstance(rows := group.get("rows"), list):
        for row in rows:
            yield {"group": group.get("group"), **_flatten_row(row, name)}
        return
    parts = {key: value for key, value in group.items() if key not in head}
    for one in parts.pop("counts", None) or ():
        head[to_text(one["value"])] = one["count"]
    for one in parts.pop("bins", None) or ():
        head[f"{_format(one['low'])} to {_format(one['high'])}"] = one["count"]
    yield head | dict(_flatten(parts, "")) if parts else head


def _find_range(group: Mapping[str, Any]) -> tuple[str, float, float, float] | None:
    """Return name, median and quartiles of a group with statistics."""
    found = group.get("quantiles")
    values: list[Any] = []
    if isinstance(found, Mapping):
        values = [found.get(q) for q in ("0.5", "0.25", "0.75")]
    if not values or not all(map(_is_number, values)):
        return None
    return (to_text(group.get("group")), values[0], values[1], values[2])


def _column_name(name: str) -> str:
    return name.removeprefix("input.") if name.startswith("input.") else f"output.{name}"


def _title(entry: Mapping[str, Any]) -> str:
    words = {
        "histogram": "Distribution of",
        "stats": "Statistics of",
        "count": "Counts",
        "collect": "All",
    }
    op, name = str(entry.get("op")), entry.get("field")
    head = words.get(op, shorten(op).replace("_", " ").capitalize())
    if op == "top_k":
        head = "Highest" if entry.get("order") == "largest" else "Lowest"
    if op == "collect" and name is None:
        head = "All answers"
    title = head if name is None else f"{head} {shorten(str(name))}"
    return f"{title} by {shorten(str(by))}" if (by := entry.get("group_by")) else title


def _missing(count: object) -> str:
    return (
        f"{count_nouns(count, 'item')} without a usable value"
        if isinstance(count, int) and count
        else ""
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format(value: Any) -> str:
    """Return a value as a cell."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"  # noqa: PLR2004
    return shorten(to_cell(value))


def _list_rows(entry: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the rows of a query or of a function; None for other entries."""
    match entry:
        case {"op": "sql", "rows": [*rows]} | {"op": "python", "result": [*rows]} if all(
            isinstance(row, Mapping) for row in rows
        ):
            return rows
    return None


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested data with their paths."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if name or key not in {"op", "field", "group_by"}:
                yield from _flatten(inner, f"{name} {key}".strip())
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        for n, inner in enumerate(value, 1):
            yield from _flatten(inner, f"{name} {n}".strip())
    else:
        yield name, value


def _flatten_row(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the row of a ranking as cells by column."""
    flat = {"rank": row.get("rank"), "id": row.get("id"), name: row.get("value")}
    parts = [row.get("show"), row.get("output")]
    for part in parts:
        for key, value in part.items() if isinstance(part, Mapping) else ():
            flat.setdefault(str(key), value)
    if not isinstance(row.get("output"), Mapping | None):
        flat["output"] = row["output"]
    return flat


def _count_bins(values: Sequence[Any]) -> list[tuple[float, float, int]]:
    """Return about 24 bins with round edges; none for fewer than two different numbers."""
    numbers = [float(v) for v in values if v is not None]
    numbers = [v for v in numbers if isfinite(v)]
    if len(set(numbers[:1000])) < 2 and len(set(numbers)) < 2:  # noqa: PLR2004
        return []
    low, high = min(numbers), max(numbers)
    if not isfinite(high - low):
        return []
    rough = (high - low) / _BINS
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = floor(low / step + 1e-9)
    count = max(1, ceil(high / step - 1e-9) - first)
    found = [0] * count
    for value in numbers:  # the highest value belongs to the last bin
        found[min(max(floor(value / step - first + 1e-9), 0), count - 1)] += 1
    return [
        (round((first + n) * step, 12), round((first + n + 1) * step, 12), amount)
        for n, amount in enumerate(found)
    ]
