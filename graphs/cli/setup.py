"""``fanfold presets`` and ``fanfold globus``: presets and Globus Compute set-up."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import click

from ...backends.core.errors import ConfigurationError
from .options import Group, argument, flag, take_output

globus = Group("globus", help="Set up Globus Compute endpoints.")


@globus.command()
@click.option("--client", metavar="MODULE:ATTR", help="Function that creates the SDK's Client.")
def register(client: str | None) -> None:
    """Log in, register the worker function, and print its id.

    Add the id to allowed_functions of an endpoint that has them; set it in backend.function.
    """
    from ...backends.workers.globus.service import connect_service
    from ...backends.workers.registry import import_object
    from ..worker import work_shard

    make = import_object(client, "--client") if client else None
    service = connect_service(make, may_prompt=sys.stdin.isatty())
    try:
        print(service.register(work_shard))
    finally:
        service.close()


@globus.command()
@take_output
@flag("--schema", about="Write the schema of the template's values instead.")
def template(target: Path | None, schema: bool) -> None:
    """Write an endpoint configuration template for this version of fanfold."""
    from ...backends.core.messages import own_version

    text = schema_text() if schema else template_text(own_version(), str(Path(sys.prefix) / "bin"))
    write_text(text, target, "" if schema else "; its first lines say where to install it")


def write_text(text: str, output: Path | None, hint: str = "") -> None:
    """Print a text, or write it to a file and say so.

    Args:
        text: The text.
        output: The file; None: standard output.
        hint: What the message adds to the name of the file.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{output}: cannot be written: {error.strerror}") from None
    print(f"{output} written{hint}")


def template_text(version: str, programs: str) -> str:
    """Return the endpoint configuration template.

    Args:
        version: The fanfold version that workers require.
        programs: The `bin` folder of the workers' Python.
    """
    return (
        _shipped("template.yaml.j2")
        .replace("@VERSION@", version)
        .replace("@BIN@", shlex.quote(programs))
    )


def schema_text() -> str:
    """Return the schema of the template's values."""
    return _shipped("schema.json")


def _shipped(name: str) -> str:
    from importlib.resources import files

    return (files("fanfold.backends.workers.globus") / name).read_text(encoding="utf-8")


presets = Group("presets", help="Ready-made configurations, one per use case.")
take_preset = argument("name", "NAME", "A preset; 'fanfold presets list' lists them.", type=str)


@presets.command("list")
def presets_list() -> None:
    """List the presets."""
    from ...configs.preset_files import preset_names, read_preset

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for name in preset_names():
        line = f"{name:24} {read_preset(name).splitlines()[0].removeprefix('# ')}"
        print(textwrap.fill(line, width, subsequent_indent=" " * 25))


@presets.command("show")
@take_preset
def presets_show(name: str) -> None:
    """Print a preset."""
    from ...configs.preset_files import read_preset

    print(read_preset(name), end="")


@presets.command("copy")
@take_preset
@argument("target", "[FILE]", "File to write; default: NAME.yaml.", required=False)
def presets_copy(name: str, target: Path | None) -> None:
    """Copy a preset to a file for editing; its endpoints are left blank."""
    from ...configs.preset_files import copy_preset

    target = target or Path(f"{name}.yaml")
    copy_preset(name, target)
    print(f"{target} written; fill in endpoints and input, then: fanfold check {target}")
