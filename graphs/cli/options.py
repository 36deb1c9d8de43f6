"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

SAMPLE_ITEMS: Final = 200
"""Prompts that ``fanfold check`` renders by default."""

COST_BY: Final = ("model", "endpoint", "node", "day")
"""Keys that costs can be grouped by."""


def nonempty(text: str | Path) -> str:
    """Return a file or folder name; reject an empty one, which means the working directory.

    Raises:
        typer.BadParameter: The name is empty, e.g. from an unset shell variable.
    """
    if not str(text):
        raise typer.BadParameter("is empty; name a file or a folder")
    try:
        str(text).encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        shown = ascii(str(text)).strip("'")
        raise typer.BadParameter(f"{shown} is not UTF-8 text") from None
    return str(text)


def nonempty_path(text: str | Path) -> Path:
    """Return a path; reject an empty one.

    Raises:
        typer.BadParameter: The path is empty.
    """
    return Path(nonempty(text))


Config = Annotated[
    str, typer.Argument(metavar="CONFIG|PRESET", parser=nonempty, help="A YAML file or a preset.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", parser=nonempty_path, help="A run folder.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", parser=nonempty_path, help="Run folder.")
]
Input = Annotated[str | None, typer.Option("--input", metavar="PATH", help="Input file or folder.")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Process only the first N items.")
]
Endpoints = Annotated[
    str | None,
    typer.Option(
        "--endpoints", metavar="URLS|FILE|simulated|auto", help="Endpoints that serve the model."
    ),
]
Saver = Annotated[
    str | None,
    typer.Option("--checkpointer", metavar="URL", help="postgresql://… instead of SQLite."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. limits.streams=64."),
]
Trace = Annotated[bool, typer.Option("--trace", help="Run and trace every item with LangGraph.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress and no tables.")]
Metrics = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", min=1, max=65535, help="Serve Prometheus metrics on this loopback port."
    ),
]
Usd = Annotated[
    float | None, typer.Option("--budget-usd", metavar="N", help="Total limit in US dollars.")
]
Tokens = Annotated[
    int | None, typer.Option("--budget-tokens", metavar="N", help="Total limit in tokens.")
]
Requests = Annotated[
    int | None, typer.Option("--budget-requests", metavar="N", help="Total limit in requests.")
]
NodeHours = Annotated[
    float | None,
    typer.Option("--budget-node-hours", metavar="N", help="Total limit in node-hours."),
]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Retry failed items.")]
