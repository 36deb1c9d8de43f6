"""``fanfold compare``: two runs over the same items, as text, JSON or a page."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.text import Text

from ...backends.core.errors import ConfigurationError
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json
from ...backends.storage.run_folder import open_folder
from ...configs.figure_names import METRICS
from ..report.texts import has_long_word
from ..run.console import open_data_stream, print_messages
from ..run.rich_console import Terminal, print_line
from .evaluation_text import format_figure, format_interval
from .format import format_duration, format_usd_amount
from .tables import Column, format_cell, make_table

_FORMATS: Final = ("text", "json", "html")
_SUFFIXES: Final = {".json": "json", ".html": "html", ".htm": "html"}
_ROWS: Final = {"text": 20, "json": 1_000, "html": 1_000}
"""Items of each field that are listed by default."""

_NAMES: Final[Mapping[str, str]] = {
    **METRICS,
    "mae": "mean absolute difference",
    "rmse": "root mean squared difference",
    "mean_difference": "mean difference, B - A",
}
CHANGES: Final = {
    "changed": "changed",
    "only_a": "only in A",
    "only_b": "only in B",
    "same": "same",
}
"""Names of what happened to an item."""


def compare_folders(
    paths: tuple[Path, Path],
    fields: Sequence[str],
    form: str | None,
    limit: int | None,
    target: Path | None,
) -> None:
    """Compare two runs, and write the comparison.

    Args:
        paths: The folders of the two runs.
        fields: Fields of the answers; none takes all that both have.
        form: ``text``, ``json`` or ``html``; None follows the suffix of ``target``.
        limit: Items to list per field; None takes the default of the format.
        target: The file; None is stdout.

    Raises:
        ConfigurationError: The runs have different items, or an option does not fit.
        JournalError: A run is damaged.
    """
    form = _choose_format(form, target)
    a, b = map(open_folder, paths)
    from ..analysis.comparison import compare_runs

    found = compare_runs(a, b, fields, _ROWS[form] if limit is None else limit)
    content = found.to_json()
    print_messages(f"WARNING: {warning}" for warning in found.warnings)
    if form == "text":
        if target is None:
            show_comparison(content, list(fields), Terminal())
            return
        with _open_target(target) as file:
            show_comparison(content, list(fields), Terminal(file=file))
    else:
        if form == "json":
            data = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        else:
            data = render_page(content).encode(errors="replace")
        if target is None:
            stream = open_data_stream(form == "json")
            stream.write(data)
            stream.flush()
            return
        with _open_target(target) as file:
            file.buffer.write(data)
    print_messages([f"Comparison: {target}"])


def _choose_format(form: str | None, target: Path | None) -> str:
    if form is not None and form not in _FORMATS:
        raise ConfigurationError(f"--format {form}: choose one of {', '.join(_FORMATS)}")
    if target is not None and not target.parent.is_dir():
        raise ConfigurationError(f"-o {target}: the folder {target.parent} does not exist")
    by_suffix = None if target is None else _SUFFIXES.get(target.suffix.lower())
    return form or by_suffix or "text"


def _open_target(target: Path) -> Any:
    try:
        return target.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigurationError(f"-o {target}: cannot be written: {error.strerror}") from None


def show_comparison(found: dict[str, Any], fields: list[str], console: Console) -> None:
    """Print a comparison: fields, changed items, gold figures, cost and latency."""
    for line in (*head_lines(found), *field_lines(found)):
        print_line(console, format_cell(line, None).plain)
    _print_table("agreement", field_columns(found), console)
    chosen = found["fields"] if fields else _choose_fields(found)
    for one in chosen:
        _print_table(f"{one['field']}: changed items first", row_columns(one), console)
    if others := [one["field"] for one in found["fields"] if one not in chosen and one["changed"]]:
        listed = format_cell(", ".join(others), None).plain
        console.print(Text(f"changed items of other fields: --field NAME ({listed})"))
    for one in found["gold"]:
        title = f"{one['field']} against {one['gold']}"
        _print_table(title, gold_columns(one), console)
        for line in difference_lines(one):
            print_line(console, line)
    _print_table("cost and latency", side_columns(found), console)
    if found["settings"]:
        console.print(Text("settings that differ (A → B)", style="bold"))
        for line in found["settings"]:
            console.print(Text(f"  {format_cell(line, None).plain}"))


def _choose_fields(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the field whose changed items are shown: they say most where they are few.

    A field with gold values comes first. Texts of the model's own words nearly always change.
    """
    gold = {one["field"] for one in found["gold"]}
    changed = [one for one in found["fields"] if one["changed"]]
    ranked = sorted(changed, key=lambda one: (one["field"] not in gold, one["changed"]))
    return (ranked or found["fields"])[:1]


def _print_table(title: str, columns: Sequence[Column], console: Console) -> None:
    print_line(console, format_cell(title, None).plain, "bold")
    for part in make_table(columns, console.width):
        console.print(part)


def head_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what is compared."""
    for name, side in (("A", found["a"]), ("B", found["b"])):
        mark = "SIMULATED: " if side["simulated"] else ""
        yield (
            f"{name}: {mark}{side['folder']} ({side['name']}, {side['model']}): {side['done']:,} "
            f"done, {side['failed']:,} failed of {side['items']:,}"
        )
    items = found["items"]
    yield (
        f"items in both: {items['common']:,}; only in A: {items['only_a']:,}; only in B: "
        f"{items['only_b']:,}"
    )
    for name in ("a", "b"):
        if only := found[f"fields_only_{name}"]:
            yield f"fields only in {name.upper()}: {', '.join(only)}"


def field_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield how many items each field has in which run, and how many have changed."""
    for one in found["fields"]:
        yield (
            f"{one['field']}: {one['changed']:,} of {one['both']:,} changed; only in A: "
            f"{one['only_a']:,}; only in B: {one['only_b']:,}"
        )


def field_columns(found: dict[str, Any]) -> list[Column]:
    """Return a table of the fields with their agreement: one row per figure."""
    rows = [
        (one["field"] if number == 0 else "", _NAMES[name], figure)
        for one in found["fields"]
        for number, (name, figure) in enumerate(one["figures"].items())
    ]
    return [
        Column("field", [field for field, _, _ in rows], is_key=True),
        Column("figure", [name for _, name, _ in rows], is_key=True),
        Column(
            "value [95 % interval]",
            [_figure_with_interval(figure) for *_, figure in rows],
            is_key=True,
            is_number=True,
        ),
    ]


def row_columns(one: dict[str, Any]) -> list[Column]:
    """Return a table of items with both values of a field."""
    rows = one["rows"]
    numeric = one["kind"] == "numeric"
    return [
        Column("id", [row["id"] for row in rows], is_key=True),
        Column("A", [row["a"] for row in rows], is_number=numeric),
        Column("B", [row["b"] for row in rows], is_number=numeric),
        Column("", [CHANGES[row["change"]] for row in rows]),
    ]


def gold_columns(one: dict[str, Any]) -> list[Column]:
    """Return a table of the figures of both runs against gold values."""
    names = [name for name in METRICS if name in one["a"] and name in one["b"]]
    return [
        Column("figure", [METRICS[name] for name in names], is_key=True),
        *(
            Column(
                head,
                [_figure_with_interval(side[name]) for name in names],
                is_key=True,
                is_number=True,
            )
            for head, side in (("A", one["a"]), ("B", one["b"]))
        ),
    ]


def _figure_with_interval(figure: dict[str, Any]) -> str:
    ends = [format_figure(figure[end]) for end in ("low", "high")]
    span = "" if figure["low"] is None else f" [{', '.join(ends)}]"
    return f"{format_figure(figure['value'])}{span}"


def difference_lines(one: dict[str, Any]) -> Iterator[str]:
    """Yield the number of items, and the difference over the items that both answered."""
    difference, counts = one["difference"], []
    for side in (one["a"], one["b"]):
        first = next(iter(side.values()), {"n": 0})
        counts.append(f"{first['n']:,}")
    yield (
        f"answered items with a gold value: {counts[0]} in A, {counts[1]} in B; in []: 95 % "
        "intervals"
    )
    if difference is None:
        yield "no paired difference: the gold values are not in the input of A"
        return
    what = "mean absolute error" if one["mcnemar_p"] is None else "accuracy"
    yield (
        f"{what} of B minus A over {count_nouns(difference['n'], 'item')} answered by both: "
        f"{format_figure(difference['value'])} ({format_interval(difference)})"
    )
    if one["mcnemar_p"] is not None:
        p = one["mcnemar_p"]
        shown = f"{p:.2g}" if p < 0.001 else f"{p:.3f}"  # noqa: PLR2004 - digits
        yield (
            f"right only in A: {one['only_a']:,}; only in B: {one['only_b']:,}; McNemar's exact "
            f"test: p = {shown}"
        )


def side_columns(found: dict[str, Any]) -> list[Column]:
    """Return a table of cost and latency of both runs."""
    sides = (found["a"], found["b"])
    rows: list[tuple[str, list[Json]]] = [
        ("requests", [f"{side['requests']:,}" for side in sides]),
        ("prompt tokens", [f"{side['prompt_tokens']:,}" for side in sides]),
        ("completion tokens", [f"{side['completion_tokens']:,}" for side in sides]),
        ("cost", [_usd(side["usd"]) for side in sides]),
        ("cost per 1,000 done", [_usd_per_thousand(side) for side in sides]),
        ("price", [(side["price"] or "-").partition(" (")[0] for side in sides]),
        ("latency, median", [_seconds(side["latency_median_s"]) for side in sides]),
        ("latency, 95 % within", [_seconds(side["latency_p95_s"]) for side in sides]),
    ]
    if any(side["reused"] for side in sides):
        rows.insert(1, ("answers reused at no cost", [f"{side['reused']:,}" for side in sides]))
    return [
        Column("", [name for name, _ in rows], is_key=True),
        Column("A", [cells[0] for _, cells in rows]),
        Column("B", [cells[1] for _, cells in rows]),
    ]


def _usd(amount: float | None) -> str:
    return "-" if amount is None else format_usd_amount(amount)


def _usd_per_thousand(side: dict[str, Any]) -> str:
    if side["usd"] is None or not side["done"]:
        return "-"
    return format_usd_amount(1000 * side["usd"] / side["done"])


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_duration(value)


_STYLE: Final = (
    ":root{color-scheme:light dark;--m:#56626f;--l:#e3e7ec}"
    "@media(prefers-color-scheme:dark){:root{--m:#98a4b0;--l:#2c343d}}"
    'body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Arial,sans-serif;'
    "font-variant-numeric:tabular-nums;margin:0 auto;max-width:1440px;padding:28px 32px}"
    "h1{font-size:26px;line-height:1.25;margin:0 0 8px;overflow-wrap:anywhere}"
    "h2{font-size:17px;margin:32px 0 8px;overflow-wrap:anywhere}"
    "p,li{margin:2px 0;overflow-wrap:anywhere}ul{margin:0;padding-left:18px}"
    ".s{overflow:auto;max-height:34rem;border:1px solid var(--l);border-radius:6px;"
    "width:fit-content;max-width:100%}"
    "table{border-collapse:collapse;font-size:14px}"
    "th,td{border-bottom:1px solid var(--l);padding:5px 14px;text-align:left;vertical-align:top;"
    "overflow-wrap:break-word;min-width:3.5em;max-width:34em}"
    "th{color:var(--m);font-weight:600;white-space:nowrap;position:sticky;top:0;background:Canvas}"
    "tr:last-child td{border-bottom:0}"
    ".n{text-align:right;white-space:nowrap}.long{overflow-wrap:anywhere}"
    ".w{border-left:3px solid #c60;padding:4px 12px;margin:8px 0}"
    "@media print{.s{max-height:none}}"
)
_LONGEST: Final = 2_000
"""Characters of a cell of the page."""
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render_page(found: dict[str, Any]) -> str:
    """Return a comparison as a page without scripts that loads nothing."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'"
    names = [found[side]["folder"] for side in ("a", "b")]
    title = "Comparison of " + " and ".join(
        name if name == side else f"{name} ({side})" for name, side in zip(names, "AB", strict=True)
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_escape(title)}</h1>"
    ]
    parts += [f'<p class="w">{_escape(warning)}</p>' for warning in found["warnings"]]
    parts += [f"<p>{_escape(line)}</p>" for line in head_lines(found)]
    fields = "".join(f"<li>{_escape(line)}</li>" for line in field_lines(found))
    parts.append(f"<ul>{fields}</ul>")
    parts += [_render_table("Agreement", field_columns(found))]
    for one in found["gold"]:
        parts.append(_render_table(f"{one['field']} against {one['gold']}", gold_columns(one)))
        parts += [f"<p>{_escape(line)}</p>" for line in difference_lines(one)]
    parts += [_render_table("Cost and latency", side_columns(found))]
    for one in found["fields"]:
        parts.append(_render_table(f"{one['field']}: changed items first", row_columns(one)))
        total = one["both"] + one["only_a"] + one["only_b"]
        if total > len(one["rows"]):
            parts.append(
                f"<p>{len(one['rows']):,} of {count_nouns(total, 'item')}; more with --limit N</p>"
            )
    if found["settings"]:
        listed = "".join(f"<li>{_escape(line)}</li>" for line in found["settings"])
        parts.append(f"<h2>Settings that differ (A → B)</h2><ul>{listed}</ul>")
    return "".join((*parts, "</body></html>\n"))


def _render_table(title: str, columns: Sequence[Column]) -> str:
    classes = [' class="n"' if column.is_number else "" for column in columns]
    head = "".join(
        f"<th{kind}>{_escape(column.head)}</th>"
        for kind, column in zip(classes, columns, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(v, kind) for kind, v in zip(classes, row, strict=True)) + "</tr>"
        for row in zip(*(column.cells for column in columns), strict=True)
    )
    return (
        f'<h2>{_escape(title)}</h2><div class="s" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Json, kind: str) -> str:
    if value is None:
        return f"<td{kind}>-</td>"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    if not kind and has_long_word(text):
        kind = ' class="long"'
    return (
        f"<td{kind}>{_escape(text if len(text) <= _LONGEST else f'{text[: _LONGEST - 1]}…')}</td>"
    )


def _escape(text: str) -> str:
    return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text))
