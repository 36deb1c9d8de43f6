"""The commands below ``presets``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .lazily import Later
from .options import nonempty_path

if TYPE_CHECKING:
    from . import looking
else:
    looking = Later(".looking")

app = typer.Typer(help="Ready configurations, one per use case.", no_args_is_help=True)


@app.command("list")
def presets_list() -> None:
    """List the presets."""
    looking.presets_list()


@app.command("show")
def presets_show(name: str) -> None:
    """Print a preset."""
    looking.presets_show(name)


@app.command("copy")
def presets_copy(
    name: str, target: Annotated[Path | None, typer.Argument(parser=nonempty_path)] = None
) -> None:
    """Write a preset to a file for editing, its endpoints left for you to fill."""
    looking.presets_copy(name, target or Path(f"{name}.yaml"))
