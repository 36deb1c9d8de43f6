"""The command line."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from ...backends.core.errors import (
    EXIT_BUDGET,
    EXIT_INTERRUPTED,
    EXIT_OTHER,
    EXIT_USAGE,
    BudgetExhaustedError,
    ConfigurationError,
    FanfoldError,
    RunStoppedError,
)
from ...backends.core.messages import own_version
from ..run.console import print_messages, print_traceback, setup_logging
from . import jobs, setup
from .options import (
    COST_BY,
    SAMPLE_ITEMS,
    AsJson,
    Config,
    Endpoints,
    Folder,
    Input,
    Limit,
    Metrics,
    NodeHours,
    Out,
    Quiet,
    Requests,
    Retry,
    Saver,
    Sets,
    Tokens,
    Trace,
    Usd,
    nonempty,
    nonempty_path,
)

_CHOICE_LOGGER: Final = "fanfold.backends.discovery.connect.choice"
"""The log that tells what ``auto`` chose; it is always shown."""

app = typer.Typer(
    name="fanfold",
    help="Map-reduce LLM inference on HPC, as a LangGraph graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(setup.presets, name="presets")
app.add_typer(setup.globus, name="globus")
jobs.add_commands(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fanfold {own_version()}")
        raise typer.Exit


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.getLogger(_CHOICE_LOGGER).setLevel(logging.INFO)
    setup_logging(level, _CHOICE_LOGGER)


@app.command()
def run(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    config: Config,
    out: Out = None,
    input_path: Input = None,
    limit: Limit = None,
    endpoints: Endpoints = None,
    checkpointer: Saver = None,
    overrides: Sets = None,
    trace: Trace = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    retry_failed: Retry = False,
    metrics_port: Metrics = None,
    budget_usd: Usd = None,
    budget_tokens: Tokens = None,
    budget_requests: Requests = None,
    budget_node_hours: NodeHours = None,
    pilot: Annotated[
        int | None,
        typer.Option("--pilot", min=1, help="Run so many items first, show what they took, ask."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Go on after the pilot unasked.")] = False,
) -> None:
    """Run a batch; on an existing run folder, go on with it."""
    from ...configs.resolve import Overrides
    from .run import OutputMode
    from .run import run_or_resume as running_run

    wish = Overrides(
        assignments=overrides or [],
        input_path=input_path,
        limit=limit,
        endpoints=endpoints,
        checkpointer=checkpointer,
        trace=trace,
        retry_failed=retry_failed,
        metrics_port=metrics_port,
        budget={
            "usd": budget_usd,
            "tokens": budget_tokens,
            "requests": budget_requests,
            "node_hours": budget_node_hours,
        },
        pilot=pilot,
        yes=yes,
    )
    raise typer.Exit(running_run(config, out, wish, OutputMode(as_json, quiet)))


@app.command()
def resume(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    folder: Folder,
    input_path: Input = None,
    limit: Limit = None,
    endpoints: Endpoints = None,
    checkpointer: Saver = None,
    overrides: Sets = None,
    trace: Trace = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    retry_failed: Retry = False,
    metrics_port: Metrics = None,
    budget_usd: Usd = None,
    budget_tokens: Tokens = None,
    budget_requests: Requests = None,
    budget_node_hours: NodeHours = None,
) -> None:
    """Go on with a run: only what is not finished is called."""
    from ...configs.resolve import Overrides
    from .run import OutputMode
    from .run import resume_folder as running_resume

    wish = Overrides(
        assignments=overrides or [],
        input_path=input_path,
        limit=limit,
        endpoints=endpoints,
        checkpointer=checkpointer,
        trace=trace,
        retry_failed=retry_failed,
        metrics_port=metrics_port,
        budget={
            "usd": budget_usd,
            "tokens": budget_tokens,
            "requests": budget_requests,
            "node_hours": budget_node_hours,
        },
    )
    raise typer.Exit(running_resume(folder, wish, OutputMode(as_json, quiet)))


@app.command()
def status(
    folder: Folder,
    as_json: AsJson = False,
    endpoints: Annotated[
        bool, typer.Option("--endpoints", help="Show what each endpoint did.")
    ] = False,
    usage: Annotated[
        bool, typer.Option("--usage", help="Add how well its jobs used their nodes.")
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="For --usage: items that one server takes at a time."),
    ] = None,
) -> None:
    """Show how far a run is."""
    from .endpoints import show_past_endpoints
    from .status import show_status as looking_status

    if endpoints:
        show_past_endpoints(folder, as_json)
    else:
        looking_status(folder, as_json, usage or batch is not None, batch)


@app.command()
def cost(
    folder: Folder,
    by: Annotated[
        str | None, typer.Option("--by", help=f"One row per {', '.join(COST_BY)}.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run has cost so far, over all of its lives: tokens, dollars, node-hours."""
    from .status import show_cost

    show_cost(folder, by, as_json)


@app.command()
def endpoints(
    config: Config,
    where: Endpoints = None,
    overrides: Sets = None,
    as_json: AsJson = False,
) -> None:
    """List the endpoints as they are now; exit with 2 when none serves the model."""
    from ...configs.resolve import Overrides
    from .endpoints import list_endpoints

    wish = Overrides(overrides or [], endpoints=where)
    raise typer.Exit(list_endpoints(config, wish, as_json))


@app.command()
def results(
    folder: Folder,
    form: Annotated[str, typer.Option("--format", help="jsonl, csv or parquet.")] = "jsonl",
    target: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", parser=nonempty_path)
    ] = None,
    safe_csv: Annotated[
        bool,
        typer.Option("--safe-csv", help="For csv: put ' before all cells that begin a formula."),
    ] = False,
) -> None:
    """Write the results so far, one row per finished item, in input order."""
    from .status import export_results as looking_results

    looking_results(folder, form, target, safe_csv)


@app.command()
def check(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    config: Config,
    input_path: Input = None,
    limit: Limit = None,
    endpoints: Endpoints = None,
    overrides: Sets = None,
    budget_usd: Usd = None,
    budget_tokens: Tokens = None,
    budget_requests: Requests = None,
    budget_node_hours: NodeHours = None,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="Items whose prompts are counted.")
    ] = SAMPLE_ITEMS,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="DIR",
            parser=nonempty_path,
            help="A run whose answers and times were alike.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check settings, input and endpoints, and estimate cost and time; calls no model."""
    from ...configs.resolve import Overrides
    from .check import check_config as checking_check

    budget = {
        "usd": budget_usd,
        "tokens": budget_tokens,
        "requests": budget_requests,
        "node_hours": budget_node_hours,
    }
    wish = Overrides(overrides or [], input_path, limit, endpoints, budget=budget)
    checking_check(config, wish, sample, like, as_json)


@app.command()
def simulate(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    nodes: Annotated[int, typer.Option(min=1, help="Simulated servers.")] = 8,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="First port; 0 takes a free one.")
    ] = 0,
    addressing: Annotated[str, typer.Option(help="path, port or addr.")] = "port",
    model: Annotated[str, typer.Option(help="Name of the model.")] = "simulated-8b",
    responder: Annotated[str, typer.Option(help="schema or esol.")] = "schema",
    file: Annotated[
        Path,
        typer.Option(
            "--file", metavar="FILE", parser=nonempty_path, help="Where to write the endpoints."
        ),
    ] = Path("endpoints.txt"),
) -> None:
    """Serve a simulated fleet on this machine until interrupted."""
    from .servers import serve_simulated as looking_simulate

    fields = {"nodes": nodes, "port": port, "addressing": addressing}
    looking_simulate(fields | {"model": model, "responder": responder}, file)


@app.command()
def serve(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|DIR", parser=nonempty, help="A YAML file, a preset or a run folder."
        ),
    ],
    servers: Annotated[
        Path,
        typer.Option(
            "--servers", metavar="DIR", parser=nonempty_path, help="Folder of the endpoints files."
        ),
    ],
    host: Annotated[
        str | None, typer.Option("--host", metavar="NAME", help="Name of this node.")
    ] = None,
    overrides: Sets = None,
) -> None:
    """Serve the model on this node (section node), until interrupted."""
    from ...configs.resolve import Overrides
    from .servers import serve_node

    serve_node(config, Overrides(overrides or []), servers, host)


def main() -> None:
    """Run the command line; every error of fanfold's own ends in one message and an exit code."""
    try:
        app()
    except FanfoldError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            _exit_quietly()
        print_messages([f"Error: {error.message}"])
        sys.exit(_exit_code(error))
    except BrokenPipeError:
        _exit_quietly()
    except Exception as error:  # noqa: BLE001 - a fault of fanfold's own: told whole, without controls
        print_traceback(error)
        sys.exit(EXIT_OTHER)


def _exit_quietly() -> NoReturn:
    """End quietly: whoever read our output has left, e.g. ``head``."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # or Python complains when it flushes at its end
    sys.exit(EXIT_OTHER)


def _exit_code(error: FanfoldError) -> int:
    if isinstance(error, ConfigurationError):
        return EXIT_USAGE
    if isinstance(error, BudgetExhaustedError):
        return EXIT_BUDGET
    return EXIT_INTERRUPTED if isinstance(error, RunStoppedError) else EXIT_OTHER
