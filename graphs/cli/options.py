"""Command-line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, Final, TypeVar

import click

SAMPLE_ITEMS: Final = 200
"""Prompts that ``fanfold check`` renders by default."""

ASK_AGAIN: Final = ("cut", "failed", "all")
"""Which finished items of an extended run are asked again: truncated ones, failed ones, all."""

COST_BY: Final = ("model", "endpoint", "node", "day")
"""Keys that costs can be grouped by."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]


class Argument(click.Argument):
    """An argument of a command, with its help text.

    Args:
        declarations: Its name.
        about: The help text.
        options: Those of click.
    """

    def __init__(self, declarations: list[str], about: str, **options: Any) -> None:
        super().__init__(declarations, **options)
        self.about = about


class Command(click.Command):
    """A command whose help describes its arguments, too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the options."""
        arguments = [one for one in self.params if isinstance(one, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl([(one.make_metavar(ctx), one.about) for one in arguments])
        super().format_options(ctx, formatter)


class Group(click.Group):
    """A group of commands of class :class:`Command`; its help lists them in order, unabridged."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - overridden
        """Return the names in the order of their declarations."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names of commands, each with the first paragraph of its help."""
        shown = [self.commands[name] for name in self.list_commands(ctx)]
        rows = [(one.name or "", _summarize(one)) for one in shown if not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _summarize(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split())


def nonempty(text: str | Path) -> str:
    """Return a file or folder name; reject an empty one, which means the working directory.

    Raises:
        click.BadParameter: The name is empty, e.g. from an unset shell variable.
    """
    if not str(text):
        raise click.BadParameter("is empty; name a file or a folder")
    try:
        str(text).encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        shown = ascii(str(text)).strip("'")
        raise click.BadParameter(f"{shown} is not UTF-8 text") from None
    return str(text)


def nonempty_path(text: str | Path) -> Path:
    """Return a path; reject an empty one.

    Raises:
        click.BadParameter: The path is empty.
    """
    return Path(nonempty(text))


def argument(name: str, metavar: str, about: str, **options: Any) -> Decorator[Any]:
    """Return a decorator that adds a path, or what ``type`` names, as an argument."""
    given = {"type": nonempty_path} | options
    return click.argument(name, cls=Argument, metavar=metavar, about=about, **given)


def path_option(*names: str, about: str, metavar: str = "FILE", **options: Any) -> Decorator[Any]:
    """Return a decorator that adds an option with a path."""
    return click.option(*names, metavar=metavar, type=nonempty_path, help=about, **options)


def text_option(*names: str, about: str, metavar: str = "NAME", **options: Any) -> Decorator[Any]:
    """Return a decorator that adds an option with a text that is not empty."""
    return click.option(*names, metavar=metavar, type=nonempty, help=about, **options)


def number_option(*names: str, about: str, least: int = 1, **options: Any) -> Decorator[Any]:
    """Return a decorator that adds an option with a whole number."""
    most = options.pop("most", None)
    kind = click.IntRange(least, most)
    return click.option(*names, metavar="N", type=kind, help=about, **options)


def flag(*names: str, about: str) -> Decorator[Any]:
    """Return a decorator that adds an option without a value."""
    return click.option(*names, is_flag=True, default=False, help=about)


take_config = argument("config", "CONFIG|PRESET", "A YAML file or a preset.", type=nonempty)
take_folder = argument("folder", "DIR", "A run folder.")
take_out = path_option(
    "--out", metavar="DIR", about="Run folder; default: a new one in fanfold-runs."
)
take_output = path_option("target", "-o", "--output", about="Output file; default: stdout.")
take_pilot = number_option(
    "--pilot", about="Run N items first, show an estimate for all, then ask."
)
take_yes = flag("--yes", about="Continue without asking, after the pilot or a plan.")
take_stage = text_option(
    "--stage",
    metavar="NAME[/LEVEL]",
    about="Of a pipeline: this stage, or a level of its operator; default: the last stage.",
)
take_json = flag("as_json", "--json", about="Print one JSON object instead of text.")

_SHARED: Final[Mapping[str, Decorator[Any]]] = {
    "input_path": click.option(
        "input_path", "--input", metavar="PATH", help="Input file or folder."
    ),
    "limit": number_option("--limit", about="Process only the first N items."),
    "endpoints": click.option(
        "--endpoints", metavar="URLS|FILE|simulated|auto", help="Endpoints that serve the model."
    ),
    "checkpointer": click.option(
        "--checkpointer",
        metavar="URL",
        help="Database for LangGraph's checkpoints, postgresql://…; default: SQLite.",
    ),
    "assignments": click.option(
        "assignments",
        "--set",
        metavar="KEY=VALUE",
        multiple=True,
        help="Override a setting, e.g. limits.streams=64.",
    ),
    "trace": flag("--trace", about="Run and trace every item with LangGraph."),
    "as_json": flag("as_json", "--json", about="Print one JSON object at the end, no progress."),
    "quiet": flag("--quiet", about="Show no progress and no tables."),
    "no_report": flag("--no-report", about="Write no report.html at the end."),
    "retry_failed": flag("--retry-failed", about="Retry failed items."),
    "metrics_port": number_option(
        "--metrics-port", most=65535, about="Serve Prometheus metrics on this loopback port."
    ),
    "budget_usd": click.option(
        "--budget-usd", metavar="N", type=float, help="Total limit in US dollars."
    ),
    "budget_tokens": click.option(
        "--budget-tokens", metavar="N", type=int, help="Total limit in tokens."
    ),
    "budget_requests": click.option(
        "--budget-requests", metavar="N", type=int, help="Total limit in requests."
    ),
    "budget_node_hours": click.option(
        "--budget-node-hours", metavar="N", type=float, help="Total limit in node-hours."
    ),
}
"""Options by the field of Overrides or OutputMode that they fill; ``budget_*`` fill its budget."""

RUN_OPTIONS: Final = tuple(_SHARED)
BUDGET_OPTIONS: Final = tuple(name for name in _SHARED if name.startswith("budget_"))


@dataclass(frozen=True, slots=True)
class OutputMode:
    """Output of a run: one JSON object, or nothing, or progress and tables.

    Attributes:
        as_json: Print one JSON object.
        quiet: Print neither progress nor tables.
        no_report: Write no report of the run.
    """

    as_json: bool
    quiet: bool
    no_report: bool = True

    @property
    def is_silent(self) -> bool:
        """Return True if progress and tables are not shown."""
        return self.as_json or self.quiet


def take_overrides(*names: str) -> Decorator[Any]:
    """Add shared options to a command.

    The command gets them as one :class:`~fanfold.configs.overrides.Overrides`, its parameter
    ``changes``, and ``as_json``, ``quiet`` and ``no_report`` as ``output``.

    Args:
        names: The options, in the order in which ``--help`` shows them.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        call = update_wrapper(partial(_call, command, names), command)
        for name in reversed(names):
            call = _SHARED[name](call)
        return call

    return decorate


def _call(command: Callable[..., Any], names: tuple[str, ...], **given: Any) -> Any:
    from ...configs.overrides import Overrides

    shared = {name: given.pop(name) for name in names}
    if "quiet" in shared:
        given["output"] = OutputMode(
            shared.pop("as_json"), shared.pop("quiet"), shared.pop("no_report", True)
        )
    budget = {n.removeprefix("budget_"): shared.pop(n) for n in names if n in BUDGET_OPTIONS}
    assignments = list(shared.pop("assignments"))
    return command(**given, changes=Overrides(assignments, budget=budget, **shared))
