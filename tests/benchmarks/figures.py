"""What benchmarks write: JSON, Markdown and SVG, with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

PACKAGES: Final = ("fanfold", "aiohttp", "langgraph", "langchain-openai", "openai")
SIMULATED: Final = (
    "The servers are simulated, and run on the same cores as the client: the figures say what "
    "the client costs, and nothing about GPUs."
)
BUSY: Final = 0.05
"""Share of the machine's CPU time taken by other programs above which figures are marked."""


@dataclass(slots=True)
class Table:
    """Figures of one question.

    Attributes:
        name: File name of its picture.
        title: The question.
        unit: Unit of all figures.
        note: How it was measured.
        rows: The measured values by row; one value per round.
        better: ``less``, ``more``, or empty if neither is.
        grouped: Whether rows are named ``group, row``; there is a column for each row of a group.
    """

    name: str
    title: str
    unit: str
    note: str
    better: str = "less"
    rows: dict[str, list[float]] = field(default_factory=dict)
    grouped: bool = False

    def add(self, row: str, value: float) -> None:
        """Add the value of one round."""
        self.rows.setdefault(row, []).append(value)


class OtherPrograms:
    """The CPU time that other programs take from now on (Linux)."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._others_s = _read_others_s()

    @property
    def share(self) -> float:
        """Return their part of the machine's CPU time; this process and its children have none."""
        passed_s = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, _read_others_s() - self._others_s) / max(passed_s, 1e-9)


def _read_others_s() -> float:
    ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - own_s


def describe_machine(others: OtherPrograms) -> dict[str, Any]:
    """Return what the figures depend on.

    Args:
        others: Made before the first measurement.
    """
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "other_programs": round(others.share, 3),
    }


@dataclass(frozen=True, slots=True)
class Page:
    """What is written about some measurements.

    Attributes:
        tables: The figures.
        machine: From `describe_machine`, after the last measurement.
        command: The command that measured them.
        servers: A sentence about the servers.
        summary: Paragraphs before the tables.
        missing: Parts that could not be measured, with the reason.
    """

    tables: Sequence[Table]
    machine: Mapping[str, Any]
    command: str
    servers: str = SIMULATED
    summary: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


def write_figures(folder: Path, page: Page) -> None:
    """Write ``figures.json``, ``README.md`` and the pictures; remove pictures of earlier tables.

    Args:
        folder: Where to write.
        page: What to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "machine": page.machine,
        "command": page.command,
        "missing": page.missing,
        "tables": [asdict(one) for one in page.tables],
    }
    (folder / "figures.json").write_text(json.dumps(data, indent=1) + "\n")
    for old in folder.glob("*.svg"):
        old.unlink()
    for table in page.tables:
        if _has_picture(table):
            _draw(table).save(folder / f"{table.name}.svg")
    parts = [*_write_head(page), *(f"{paragraph}\n" for paragraph in page.summary)]
    for table in page.tables:
        parts += _write_table(table)
    (folder / "README.md").write_text("\n".join(parts))


def _write_head(page: Page) -> list[str]:
    machine = page.machine
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    parts = [
        "# Benchmarks\n",
        f"<!-- Written by '{page.command}'; do not edit. -->\n",
        f"{page.servers}\n",
        f"Measured on {machine['date']} by `{page.command}`: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, Python "
        f"{machine['python']}, {packages}. Sides alternate within one run; a figure is the median "
        "of the rounds, with their range. Figures without a range are of one round.\n",
    ]
    if machine["other_programs"] > BUSY:
        parts.append(
            f"**Other programs used this machine** ({100 * machine['other_programs']:.0f} % of its "
            "CPU time during the measurements). Compare rows, not absolute figures.\n"
        )
    parts += [f"**Not measured: {name}.** `{why}`\n" for name, why in page.missing.items()]
    return parts


def _has_picture(table: Table) -> bool:
    return len(table.rows) > 1


def _write_table(table: Table) -> list[str]:
    parts = [f"## {table.title}\n\n{table.note}\n"]
    if table.grouped:
        parts += _write_groups(table)
    elif all(len(values) == 1 for values in table.rows.values()):
        parts.append(f"| | {table.unit} |\n|---|---|")
        parts += [f"| {row} | {_show(values[0])} |" for row, values in table.rows.items()]
    else:
        parts.append(f"| | {table.unit} | range | rounds |\n|---|---|---|---|")
        parts += [
            f"| {row} | {_show(median(values))} | {_show(min(values))} to {_show(max(values))} "
            f"| {len(values)} |"
            for row, values in table.rows.items()
        ]
    if _has_picture(table):
        parts.append(f"\n![{table.title}]({table.name}.svg)")
    return [*parts, ""]


def _split(row: str) -> tuple[str, str]:
    group, _, name = row.partition(", ")
    return group, name


def _write_groups(table: Table) -> list[str]:
    groups = dict.fromkeys(_split(row)[0] for row in table.rows)
    names = dict.fromkeys(_split(row)[1] for row in table.rows)
    lines = [f"| {table.unit} | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for group in groups:
        found = [table.rows.get(f"{group}, {name}") for name in names]
        cells = [_show(median(values)) if values else "" for values in found]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return lines


def _show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _draw(table: Table) -> Any:
    import altair as alt  # noqa: PLC0415 - half a second that measurements do not need

    rows = [
        {
            "group": _split(row)[0],
            "row": _split(row)[1] if table.grouped else row,
            "median": median(values),
            "low": min(values),
            "high": max(values),
        }
        for row, values in table.rows.items()
    ]
    better = f" ({table.better} is better)" if table.better else ""
    x = alt.X("median:Q", title=f"{table.unit}{better}")
    base = alt.Chart(alt.Data(values=rows))
    if table.grouped:
        names = list(dict.fromkeys(row["row"] for row in rows))
        groups = {row["group"] for row in rows}
        y = alt.Y("group:N", sort=None, title=None, axis=alt.Axis(labelLimit=260))
        color = alt.Color("row:N", sort=names, title=None)
        bars = base.mark_bar().encode(
            x=x, y=y, yOffset=alt.YOffset("row:N", sort=names), color=color
        )
        height = len(groups) * (10 * len(names) + 10)
        return bars.properties(width=460, height=height, title=table.title)
    y = alt.Y("row:N", sort=None, title=None, axis=alt.Axis(labelLimit=260))
    bars = base.mark_bar(color="#4c78a8", height=14).encode(x=x, y=y)
    if all(len(values) == 1 for values in table.rows.values()):
        return bars.properties(width=460, height=24 * len(rows), title=table.title)
    ranges = base.mark_rule(color="#222", strokeWidth=2).encode(x="low:Q", x2="high:Q", y=y)
    return (bars + ranges).properties(width=460, height=24 * len(rows), title=table.title)
