"""The commands below ``presets``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import nonempty_path

app = typer.Typer(help="Ready configurations, one per use case.", no_args_is_help=True)


@app.command("list")
def presets_list() -> None:
    """List the presets."""
    from .looking import presets_list as looking_presets_list

    looking_presets_list()


@app.command("show")
def presets_show(name: str) -> None:
    """Print a preset."""
    from .looking import presets_show as looking_presets_show

    looking_presets_show(name)


@app.command("copy")
def presets_copy(
    name: str, target: Annotated[Path | None, typer.Argument(parser=nonempty_path)] = None
) -> None:
    """Write a preset to a file for editing, its endpoints left for you to fill."""
    from .looking import presets_copy as looking_presets_copy

    looking_presets_copy(name, target or Path(f"{name}.yaml"))
