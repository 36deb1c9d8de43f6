"""How comparisons with gold values are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.console import Console

from ...backends.core.errors import FanfoldError
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import EVALUATION_REFUSED, RunFolder, read_evaluation
from ...configs.figure_names import METRICS, MISSING_CAUSES
from ..run.rich_console import print_line
from .tables import Column, format_cell, make_table

_IN_STATUS: Final = ("accuracy", "f1_macro", "kappa", "mae", "rmse", "spearman")
_MOST_SHOWN: Final = 12
"""Labels of a confusion matrix that a terminal shows."""


def show_evaluations(evaluations: list[dict[str, Any]], console: Console) -> None:
    """Print comparisons: figures with intervals, classes and confusion matrix."""
    for one in evaluations:
        print_line(console, _head(one), "bold")
        for table in (_metrics(one), _classes(one), _confusion(one)):
            if table and table[0].cells:
                for part in make_table(table, console.width, splits=True):
                    console.print(part)
        for note in one["notes"]:
            print_line(console, f"note: {format_cell(note, None).plain}")


def _head(one: Mapping[str, Any]) -> str:
    parts = [f"{one['answered']:,} of {count_nouns(one['items'], 'item')} answered"]
    causes = [
        f"{count:,} {MISSING_CAUSES.get(cause, cause)}"
        for cause, count in one["missing_by_cause"].items()
    ]
    if one["missing"]:
        parts.append(f"{one['missing']:,} missing ({', '.join(causes)})")
    if one["unlabelled"]:
        parts.append(f"{one['unlabelled']:,} more without a gold value")
    name, gold = (format_cell(one[key], None).plain for key in ("field", "gold"))
    return f"evaluation of {name} against {gold}: {', '.join(parts)}"


def _metrics(one: Mapping[str, Any]) -> list[Column]:
    shown = [(METRICS[name], one["metrics"][name]) for name in METRICS if name in one["metrics"]]
    return [
        Column("figure", [name for name, _ in shown], is_key=True),
        Column("value", [format_figure(figure["value"]) for _, figure in shown], is_number=True),
        Column("95 % interval", [format_interval(figure) for _, figure in shown], is_number=True),
        Column("n", [f"{figure['n']:,}" for _, figure in shown], is_number=True),
    ]


def _classes(one: Mapping[str, Any]) -> list[Column]:
    classes = one["classes"]
    shown = list(classes.items())
    columns = [Column(one["gold"], [name for name, _ in shown], is_key=True)]
    for key in ("precision", "recall", "f1"):
        cells = [format_figure(about[key]) for _, about in shown]
        columns.append(Column(key, cells, is_number=True))
    return [
        *columns,
        *(
            Column(key, [f"{about[key]:,}" for _, about in shown], is_number=True)
            for key in ("support", "missing")
        ),
    ]


def _confusion(one: Mapping[str, Any]) -> list[Column]:
    labels, counts = one["confusion"]["labels"], one["confusion"]["counts"]
    if len(labels) > _MOST_SHOWN:
        return []
    head = f"{one['gold']} \\ answer"
    return [
        Column(head, labels, is_key=True),
        *(
            Column(label, [f"{row[number]:,}" for row in counts], is_number=True)
            for number, label in enumerate(labels)
        ),
    ]


def format_figure(value: float | None) -> str:
    """Return a figure with three decimals, or four digits if it is large."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"  # noqa: PLR2004 - digits


def format_interval(figure: Mapping[str, Any]) -> str:
    """Return the interval of a figure."""
    if figure["low"] is None or figure["high"] is None:
        return "-"
    return f"{format_figure(figure['low'])} to {format_figure(figure['high'])}"


def describe_evaluation(folder: RunFolder) -> Iterator[str]:
    """Yield a line per comparison of a run with its main figures, or why there are none."""
    try:
        found = read_evaluation(folder)
    except FanfoldError as error:
        yield error.message
        return
    if found is None:
        return
    if found["simulated"]:
        yield f"evaluation: {EVALUATION_REFUSED}"
    for one in found["evaluations"]:
        figures = [
            f"{METRICS[name]} {format_figure(figure['value'])} ({format_interval(figure)})"
            for name in _IN_STATUS
            if (figure := one["metrics"].get(name)) is not None
        ]
        yield f"{_head(one)}; {', '.join(figures) or 'no figures'}"


def get_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the comparisons of a run; none if it was not evaluated."""
    found = read_evaluation(folder)
    return [] if found is None else list(found["evaluations"])


def evaluation_facts(folder: RunFolder) -> dict[str, Any]:
    """Return the comparisons of a run for ``--json``, or why there are none; nothing without."""
    found = read_evaluation(folder)
    if found is None:
        return {}
    if found["simulated"]:
        return {"evaluation": [], "evaluation_refused": EVALUATION_REFUSED}
    return {"evaluation": found["evaluations"]}
