"""Command-line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_type_hints

import typer

SAMPLE_ITEMS: Final = 200
"""Prompts that ``fanfold check`` renders by default."""

ASK_AGAIN: Final = ("cut", "failed", "all")
"""Which finished items of an extended run are asked again: truncated ones, failed ones, all."""

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
Pilot = Annotated[
    int | None,
    typer.Option("--pilot", min=1, help="Run N items first, show an estimate for all, then ask."),
]
Yes = Annotated[
    bool, typer.Option("--yes", help="Continue without asking, after the pilot or a plan.")
]
Stage = Annotated[
    str | None,
    typer.Option(
        "--stage",
        metavar="NAME[/LEVEL]",
        parser=nonempty,
        help="Of a pipeline: this stage, or a level of its operator; default: the last stage.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]

_SHARED: Final[Mapping[str, Any]] = {
    "input_path": Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Input file or folder.")
    ],
    "limit": Annotated[
        int | None, typer.Option("--limit", min=1, help="Process only the first N items.")
    ],
    "endpoints": Annotated[
        str | None,
        typer.Option(
            "--endpoints",
            metavar="URLS|FILE|simulated|auto",
            help="Endpoints that serve the model.",
        ),
    ],
    "checkpointer": Annotated[
        str | None,
        typer.Option("--checkpointer", metavar="URL", help="postgresql://… instead of SQLite."),
    ],
    "assignments": Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, e.g. limits.streams=64."
        ),
    ],
    "trace": Annotated[
        bool, typer.Option("--trace", help="Run and trace every item with LangGraph.")
    ],
    "as_json": AsJson,
    "quiet": Annotated[bool, typer.Option("--quiet", help="Show no progress and no tables.")],
    "no_report": Annotated[
        bool, typer.Option("--no-report", help="Write no report.html at the end.")
    ],
    "retry_failed": Annotated[bool, typer.Option("--retry-failed", help="Retry failed items.")],
    "metrics_port": Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            min=1,
            max=65535,
            help="Serve Prometheus metrics on this loopback port.",
        ),
    ],
    "budget_usd": Annotated[
        float | None, typer.Option("--budget-usd", metavar="N", help="Total limit in US dollars.")
    ],
    "budget_tokens": Annotated[
        int | None, typer.Option("--budget-tokens", metavar="N", help="Total limit in tokens.")
    ],
    "budget_requests": Annotated[
        int | None, typer.Option("--budget-requests", metavar="N", help="Total limit in requests.")
    ],
    "budget_node_hours": Annotated[
        float | None,
        typer.Option("--budget-node-hours", metavar="N", help="Total limit in node-hours."),
    ],
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


def take_overrides(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command shared options in place of its parameter ``changes``.

    Typer reads the options from the signature of the command. The command itself gets them as one
    :class:`~fanfold.configs.resolve.Overrides`, and ``as_json`` and ``quiet`` as ``output``.

    Args:
        names: The options, in the order in which ``--help`` shows them.
    """
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=_default(kind))
        for name, kind in ((name, _SHARED[name]) for name in names)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            from ...configs.resolve import Overrides

            shared = {name: given.pop(name) for name in names}
            if "quiet" in shared:
                given["output"] = OutputMode(
                    shared.pop("as_json"), shared.pop("quiet"), shared.pop("no_report", True)
                )
            budget = {
                n.removeprefix("budget_"): shared.pop(n) for n in names if n in BUDGET_OPTIONS
            }
            assignments = shared.pop("assignments") or []
            command(**given, changes=Overrides(assignments, budget=budget, **shared))

        hints = get_type_hints(command, localns={"Overrides": Any}, include_extras=True)
        shown = list[Parameter]()
        for name, own in signature(command).parameters.items():
            if name == "changes":
                shown += options
            elif name != "output":
                shown.append(own.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = Signature(shown)  # type: ignore[attr-defined] # read by inspect
        call.__annotations__ = {}
        return call

    return decorate


def _default(kind: Any) -> Any:
    return False if get_args(kind)[0] is bool else None
