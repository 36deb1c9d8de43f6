"""The evaluation of a run against gold answers, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, Final

from ...configs.figure_names import METRICS, MISSING_CAUSES
from .charts import Charts
from .findings import Finding
from .texts import NONE, shorten

_MOST_LABELS: Final = 16
"""Labels of a confusion matrix that is drawn."""


def make_evaluations(
    entries: Sequence[Mapping[str, Any]], charts: Charts | None
) -> Iterator[Finding]:
    """Yield the findings of evaluations: their metrics, and confusion matrices."""
    for entry in entries:
        names = f"{shorten(str(entry.get('field')))} against {shorten(str(entry.get('gold')))}"
        yield _make_metrics(entry, names, charts)
        confusion = entry.get("confusion")
        if isinstance(confusion, Mapping) and confusion.get("labels"):
            yield _make_confusion(confusion, names, charts)


def _make_metrics(entry: Mapping[str, Any], names: str, charts: Charts | None) -> Finding:
    metrics: Mapping[str, Mapping[str, Any]] = entry.get("metrics") or {}
    rows = [
        [_name(name), _number(one.get("value")), _range(one), f"{one.get('n') or 0:,}"]
        for name, one in metrics.items()
    ]
    bounded = [
        (_name(name), one["value"], one.get("low"), one.get("high"))
        for name, one in metrics.items()
        if _is_share(one)
    ]
    svg = charts.draw_intervals(bounded, f"evaluation of {names}") if charts and bounded else None
    missing = entry.get("missing") or 0
    note = f"{entry.get('answered') or 0:,} of {entry.get('items') or 0:,} items with a gold value"
    if missing:
        causes = entry.get("missing_by_cause") or {}
        words = ", ".join(
            f"{count:,} {shorten(MISSING_CAUSES.get(name, str(name)))}"
            for name, count in causes.items()
        )
        note += f"; {missing:,} without an answer count as missing" + f" ({words})" * bool(words)
    head = ("figure", "value", "95 % interval", "n")
    title = f"Evaluation: {names}"
    return Finding(title, note, svg, (), head, rows, (False, True, True, True), svg is None)


def _name(metric: str) -> str:
    return shorten(METRICS.get(metric, metric))


def _is_share(one: Mapping[str, Any]) -> bool:
    """Return True for a metric between -1 and 1, as far as its numbers tell."""
    given = [one.get(name) for name in ("value", "low", "high")]
    known = [value for value in given if isinstance(value, int | float)]
    return given[0] in known and all(-1 <= value <= 1 for value in known)


def _make_confusion(confusion: Mapping[str, Any], names: str, charts: Charts | None) -> Finding:
    labels = [str(label) for label in confusion["labels"]]
    counts: list[list[int]] = confusion["counts"]
    rows = [
        [shorten(label), *(f"{count:,}" for count in line)]
        for label, line in zip(labels, counts, strict=True)
    ]
    title = f"Confusion: {names}"
    svg = (
        charts.draw_matrix(labels, counts, title)
        if charts and len(labels) <= _MOST_LABELS
        else None
    )
    head = ("gold, then answer", *map(shorten, labels))
    numbers = (False, *[True] * len(labels))
    note = "a row per gold value, a column per answer; the shade is the share of the row"
    return Finding(title, note, svg, (), head, rows, numbers, svg is None)


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or not isfinite(value):
        return NONE
    return f"{value:.4g}"


def _range(one: Mapping[str, Any]) -> str:
    if one.get("low") is None or one.get("high") is None:
        return NONE
    return f"{_number(one['low'])} to {_number(one['high'])}"
