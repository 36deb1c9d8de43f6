"""What benchmarks write: JSON, Markdown and SVG, with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
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
BUSY: Final = 0.3
"""Load per core above which figures are marked: other programs took part of the machine."""


@dataclass(slots=True)
class Table:
    """Figures of one question.

    Attributes:
        name: File name of its picture.
        title: The question.
        unit: Unit of all figures.
        note: How it was measured.
        rows: The measured values by row; one value per round.
        better: ``less`` or ``more``.
    """

    name: str
    title: str
    unit: str
    note: str
    better: str = "less"
    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: str, value: float) -> None:
        """Add the value of one round."""
        self.rows.setdefault(row, []).append(value)


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "load_before": round(load, 2),
        "busy": load / cores > BUSY,
    }


def write_figures(
    folder: Path,
    tables: Sequence[Table],
    machine: dict[str, Any],
    how: str,
    servers: str = SIMULATED,
) -> None:
    """Write ``figures.json``, ``README.md`` and a picture of each table.

    Args:
        folder: Where to write.
        tables: The figures.
        machine: What `describe_machine` said before the first measurement.
        how: The command that measured them.
        servers: A sentence about the servers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"machine": machine, "command": how, "tables": [asdict(one) for one in tables]}
    (folder / "figures.json").write_text(json.dumps(plain, indent=1) + "\n")
    for table in tables:
        _draw(table).save(folder / f"{table.name}.svg")
    (folder / "README.md").write_text(_write_page(tables, machine, how, servers))


def _write_page(tables: Sequence[Table], machine: dict[str, Any], how: str, servers: str) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    parts = [
        "# Benchmarks\n",
        f"<!-- Written by '{how}'; do not edit. -->\n",
        f"{servers}\n",
        f"Measured on {machine['date']} by `{how}`: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}, "
        f"{packages}. Sides alternate within one run; a figure is the median, the range is over "
        "all rounds.\n",
    ]
    if machine["busy"]:
        parts.append(
            f"**Other programs used this machine** (load {machine['load_before']} on "
            f"{machine['cores']} cores before the start). Compare rows, not absolute figures.\n"
        )
    for table in tables:
        parts.append(f"## {table.title}\n\n{table.note}\n")
        parts.append(f"| | {table.unit} | range | rounds |\n|---|---|---|---|")
        parts.extend(
            f"| {row} | {_show(median(values))} | {_show(min(values))} to {_show(max(values))} "
            f"| {len(values)} |"
            for row, values in table.rows.items()
        )
        parts.append(f"\n![{table.title}]({table.name}.svg)\n")
    return "\n".join(parts)


def _show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _draw(table: Table) -> Any:
    import altair as alt  # noqa: PLC0415 - half a second that measurements do not need

    rows = [
        {"row": row, "median": median(values), "low": min(values), "high": max(values)}
        for row, values in table.rows.items()
    ]
    y = alt.Y("row:N", sort=None, title=None, axis=alt.Axis(labelLimit=260))
    base = alt.Chart(alt.Data(values=rows))
    bars = base.mark_bar(color="#4c78a8", height=14).encode(
        x=alt.X("median:Q", title=f"{table.unit} ({table.better} is better)"), y=y
    )
    ranges = base.mark_rule(color="#222", strokeWidth=2).encode(x="low:Q", x2="high:Q", y=y)
    return (bars + ranges).properties(width=460, height=24 * len(rows), title=table.title)
