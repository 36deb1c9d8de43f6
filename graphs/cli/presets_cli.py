"""The commands below ``presets``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import nonempty_path

presets = typer.Typer(help="Ready configurations, one per use case.", no_args_is_help=True)


@presets.command("list")
def presets_list() -> None:
    """List the presets."""
    from ...configs.loader import preset_names, preset_text

    for name in preset_names():
        print(f"{name:24} {preset_text(name).splitlines()[0].removeprefix('# ')}")


@presets.command("show")
def presets_show(name: str) -> None:
    """Print a preset."""
    from ...configs.loader import preset_text

    print(preset_text(name), end="")


@presets.command("copy")
def presets_copy(
    name: str, target: Annotated[Path | None, typer.Argument(parser=nonempty_path)] = None
) -> None:
    """Write a preset to a file for editing, its endpoints left for you to fill."""
    from ...configs.loader import copy_preset

    target = target or Path(f"{name}.yaml")
    copy_preset(name, target)
    print(f"{target} written; fill in endpoints and input, then: fanfold check {target}")
