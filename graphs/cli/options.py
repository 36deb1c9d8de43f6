"""Options that several commands have, and what their help names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

SAMPLE_ITEMS: Final = 200
"""Items that a check renders."""

COST_BY: Final = ("model", "endpoint", "node", "day")
"""What costs can be told by."""


def nonempty(text: str | Path) -> str:
    """Return the name of a file or folder; an empty one would be the working directory.

    Raises:
        typer.BadParameter: It is empty, as a variable of the shell is that is not set.
    """
    if not str(text):
        raise typer.BadParameter("is empty; name a file or a folder")
    return str(text)


def nonempty_path(text: str | Path) -> Path:
    """Return a file or folder that was named.

    Raises:
        typer.BadParameter: It is empty.
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
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many items.")]
Endpoints = Annotated[
    str | None,
    typer.Option(
        "--endpoints", metavar="URLS|FILE|simulated|auto", help="Where the model is served."
    ),
]
Saver = Annotated[
    str | None,
    typer.Option("--checkpointer", metavar="URL", help="postgresql://… in place of SQLite."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. limits.streams=64."),
]
Trace = Annotated[bool, typer.Option("--trace", help="Run and trace every item by LangGraph.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress and no tables.")]
Metrics = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", min=1, max=65535, help="Serve Prometheus metrics on this loopback port."
    ),
]
Usd = Annotated[
    float | None, typer.Option("--budget-usd", metavar="N", help="Total cap in US dollars.")
]
Tokens = Annotated[
    int | None, typer.Option("--budget-tokens", metavar="N", help="Total cap in tokens.")
]
Requests = Annotated[
    int | None, typer.Option("--budget-requests", metavar="N", help="Total cap in requests.")
]
NodeHours = Annotated[
    float | None, typer.Option("--budget-node-hours", metavar="N", help="Total cap in node-hours.")
]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Ask failed items again.")]
