"""The fanfold command line: commands, options and exit codes."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

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
    ASK_AGAIN,
    BUDGET_OPTIONS,
    COST_BY,
    RUN_OPTIONS,
    SAMPLE_ITEMS,
    AsJson,
    Config,
    Folder,
    Out,
    OutputMode,
    Pilot,
    Stage,
    Yes,
    nonempty,
    nonempty_path,
    take_overrides,
)

if TYPE_CHECKING:
    from ...configs.resolve import Overrides

_SHOWN_LOGGERS: Final = (
    "fanfold.backends.discovery.connect.choice",
    "fanfold.backends.batch.transport.events",
)
"""Loggers that are always shown: what ``endpoints: auto`` chose, and what happens to batches."""

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


def folder_is_pipeline(path: Path) -> bool:
    """Return True if a run folder is that of a pipeline of stages."""
    from ...backends.storage.run_folder import open_folder

    return open_folder(path).is_pipeline


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
    setup_logging(level, _SHOWN_LOGGERS)


@app.command()
@take_overrides(*RUN_OPTIONS)
def run(  # noqa: PLR0913 - typer wants one parameter per option
    config: Config,
    out: Out = None,
    *,
    changes: Overrides,
    output: OutputMode,
    pilot: Pilot = None,
    yes: Yes = False,
    extends: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            parser=nonempty_path,
            help="Take over the finished items of this run whose question is the same.",
        ),
    ] = None,
    ask_again: Annotated[
        str | None,
        typer.Option(
            "--ask-again",
            metavar="|".join(ASK_AGAIN),
            help="With --from: finished items to ask again; default: by what has changed.",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="CONDITIONS",
            parser=nonempty,
            help="With --from: only items that were failed, or e.g. 'output.score > 0.8'.",
        ),
    ] = None,
) -> None:
    """Run a batch, or resume it if the run folder exists."""
    from .run import run_or_resume

    changes = replace(changes, pilot=pilot, yes=yes)
    changes = replace(changes, extends=extends, ask_again=ask_again, only=only)
    raise typer.Exit(run_or_resume(config, out, changes, output))


@app.command()
@take_overrides(*RUN_OPTIONS)
def resume(folder: Folder, changes: Overrides, output: OutputMode) -> None:
    """Resume a run: process only its unfinished items."""
    from .resume import resume_folder

    raise typer.Exit(resume_folder(folder, changes, output))


@app.command()
@take_overrides(
    "checkpointer",
    "assignments",
    "as_json",
    "quiet",
    "retry_failed",
    "metrics_port",
    *BUDGET_OPTIONS,
)
def batch(  # noqa: PLR0913 - typer wants one parameter per option
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", parser=nonempty_path, help="A file in OpenAI's batch format."),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", parser=nonempty_path, help="Output file; lines are added as they end."
        ),
    ],
    *,
    endpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoints",
            metavar="URLS|FILE|simulated|auto",
            help="Endpoints that serve the model; URLs may be repeated.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="FILE", parser=nonempty, help="Settings, without input and task."
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors",
            metavar="FILE",
            parser=nonempty_path,
            help="Output file for failed lines; default: OUT.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            metavar="DIR",
            parser=nonempty_path,
            help="Run folder; default: OUT.fanfold.",
        ),
    ] = None,
    media_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-media-domains",
            metavar="HOST",
            help="Host from which audio (file_url) may be fetched; may be repeated.",
        ),
    ] = None,
    changes: Overrides,
    output: OutputMode,
    pilot: Pilot = None,
    yes: Yes = False,
) -> None:
    """Process a file in OpenAI's batch format, or resume it."""
    from .batch import BatchFileNames, run_batch

    changes = replace(changes, pilot=pilot, yes=yes)
    files = BatchFileNames(source, target, errors, folder, tuple(media_hosts or ()))
    raise typer.Exit(run_batch(files, config, endpoints or [], changes, output))


@app.command()
def status(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    folder: Folder,
    as_json: AsJson = False,
    endpoints: Annotated[
        bool, typer.Option("--endpoints", help="Show statistics per endpoint.")
    ] = False,
    usage: Annotated[
        bool, typer.Option("--usage", help="Add the node utilization of its jobs.")
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="With --usage: concurrent items per server."),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            metavar="NAME[/LEVEL]",
            parser=nonempty,
            help="Of a pipeline: only this stage, or a level of its operator.",
        ),
    ] = None,
) -> None:
    """Show the progress of a run."""
    from ..run.stage_folder import find_run, is_operator

    run = folder if stage is None else find_run(folder, stage)
    if endpoints:
        from .endpoints import show_past_endpoints

        show_past_endpoints(run, as_json)
    elif folder_is_pipeline(run):
        from .stage_status import show_pipeline_status

        show_pipeline_status(run, as_json)
    elif is_operator(run):
        from .stage_status import show_pipeline_status

        show_pipeline_status(folder, as_json, stage)
    else:
        from .status import show_status

        show_status(run, as_json, usage or batch is not None, batch)


@app.command()
def ls(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="[DIR]", parser=nonempty_path, help="A folder of runs, or a run folder."
        ),
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, the latest first."""
    from .runs import list_runs

    list_runs(folder, as_json)


@app.command()
def watch(
    folder: Folder,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            metavar="NAME[/LEVEL]",
            parser=nonempty,
            help="Of a pipeline: this stage or level; default: the one that is worked on.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the endpoints of a run do over time; Ctrl-C leaves, and the run goes on."""
    from ..run.stage_folder import find_run
    from .watch import watch_run

    watch_run(folder if stage is None else find_run(folder, stage), as_json)


@app.command()
def show(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    folder: Folder,
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="A,B,…", help="Columns, e.g. id,output.score,smiles."),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show failed items only.")] = False,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="[-]COLUMN",
            parser=nonempty,
            help="Rows by a column, e.g. output.score; -output.score has the highest first.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Number of rows.")] = 20,
    stage: Stage = None,
    as_json: AsJson = False,
) -> None:
    """Show rows of the results so far."""
    from ..run.stage_folder import find_run
    from .show import show_rows

    folder = find_run(folder, stage)
    show_rows(folder, columns, "failed" if failed else None, limit, as_json, sort)


@app.command()
def failures(
    folder: Folder,
    error_class: Annotated[
        str | None,
        typer.Option(
            "--class", metavar="NAME", help="List the ids of the items with this error class."
        ),
    ] = None,
    stage: Stage = None,
    as_json: AsJson = False,
) -> None:
    """Show the error classes of a run, each with a remedy and an example."""
    if folder_is_pipeline(folder):
        from .stage_status import show_stage_failures

        show_stage_failures(folder, stage, error_class, as_json)
    else:
        from .failures import show_failures

        show_failures(folder, error_class, as_json)


@app.command()
def compare(  # noqa: PLR0913 - typer wants one parameter per option
    a: Annotated[Path, typer.Argument(metavar="A", parser=nonempty_path, help="A run folder.")],
    b: Annotated[
        Path,
        typer.Argument(
            metavar="B", parser=nonempty_path, help="Folder of a run over the same items."
        ),
    ],
    *,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            metavar="NAME",
            help="Field of the answers to compare; may be repeated; default: all in both.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="text, json or html; default: by the suffix, or text."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=0, help="Items to list per field; default: 20, in files 1000."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            parser=nonempty_path,
            help="Output file; default: stdout.",
        ),
    ] = None,
) -> None:
    """Compare two runs over the same items: agreement, changes, gold figures, cost, latency."""
    from .compare import compare_folders

    compare_folders((a, b), field or [], form, limit, target)


@app.command()
def evaluate(  # noqa: PLR0913 - typer wants one parameter per option
    folder: Folder,
    *,
    gold: Annotated[
        str | None,
        typer.Option(
            "--gold",
            metavar="COLUMN",
            parser=nonempty,
            help="Column with the gold values; default: the settings of the run.",
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            "--field", metavar="NAME", parser=nonempty, help="Field of the answer to compare."
        ),
    ] = None,
    gold_file: Annotated[
        Path | None,
        typer.Option(
            "--gold-file",
            metavar="FILE",
            parser=nonempty_path,
            help="File with the gold values; default: the input of the run.",
        ),
    ] = None,
    gold_id: Annotated[
        str | None,
        typer.Option(
            "--gold-id",
            metavar="COLUMN",
            parser=nonempty,
            help="Column of that file with the ids of the items; default: that of the input.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the answers of a run with gold values: accuracy, F1, kappa, errors."""
    from .evaluate import GoldOptions, evaluate_run

    evaluate_run(folder, GoldOptions(gold, field, gold_file, gold_id), as_json)


@app.command()
def report(
    folder: Folder,
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            parser=nonempty_path,
            help="File to write; default: DIR/report.html.",
        ),
    ] = None,
    stage: Stage = None,
) -> None:
    """Write a run as one HTML page: finding, items, failures, endpoints, settings."""
    from ..run.stage_folder import find_run
    from .report import show_report

    show_report(find_run(folder, stage), target)


@app.command()
def cost(
    folder: Folder,
    by: Annotated[
        str | None, typer.Option("--by", help=f"One row per {', '.join(COST_BY)}.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the cost of a run over all its sessions: tokens, dollars, node-hours."""
    if folder_is_pipeline(folder):
        from .stage_status import show_pipeline_cost

        show_pipeline_cost(folder, by, as_json)
    else:
        from .status import show_cost

        show_cost(folder, by, as_json)


@app.command()
@take_overrides("endpoints", "assignments")
def endpoints(config: Config, changes: Overrides, as_json: AsJson = False) -> None:
    """List the endpoints and their current state; exit with 2 if none serves the model."""
    from .endpoints import list_endpoints

    raise typer.Exit(list_endpoints(config, changes, as_json))


@app.command()
def results(  # noqa: PLR0913 - typer wants one parameter per option
    folder: Folder,
    *,
    form: Annotated[
        str | None,
        typer.Option("--format", help="jsonl, csv or parquet; default: by the suffix, or jsonl."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            parser=nonempty_path,
            help="Output file; default: stdout.",
        ),
    ] = None,
    safe_csv: Annotated[
        bool,
        typer.Option("--safe-csv", help="With csv: put ' before cells that start a formula."),
    ] = False,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Add the messages of each item (column prompt).")
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Add the text of the answer where the run kept it (column raw)."
        ),
    ] = False,
    samples: Annotated[
        bool,
        typer.Option("--samples", help="One row per sample, if each row was asked several times."),
    ] = False,
    stage: Stage = None,
) -> None:
    """Write the results so far, one row per finished item, in input order."""
    from .export import export_results

    optional = [name for name, is_given in (("prompt", prompt), ("raw", raw)) if is_given]
    export_results(folder, form, target, safe_csv, optional, samples=samples, stage=stage)


@app.command()
@take_overrides("input_path", "limit", "endpoints", "assignments", *BUDGET_OPTIONS)
def check(
    config: Config,
    changes: Overrides,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="Number of prompts to render and count.")
    ] = SAMPLE_ITEMS,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="DIR",
            parser=nonempty_path,
            help="A similar run to take answer lengths and times from.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate the config and estimate tokens, cost and time, without calling the model."""
    from .check import check_config

    check_config(config, changes, sample, like, as_json)


@app.command()
def schema(output: setup.Output = None) -> None:
    """Write the JSON Schema of a configuration file, for editors."""
    from ...configs.preset_files import read_settings_schema

    setup.write_text(read_settings_schema(), output)


@app.command()
def simulate(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    nodes: Annotated[int, typer.Option(min=1, help="Number of simulated servers.")] = 8,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="First port; 0 picks free ports.")
    ] = 0,
    addressing: Annotated[str, typer.Option(help="path, port or addr.")] = "port",
    model: Annotated[str, typer.Option(help="Model name.")] = "simulated-8b",
    responder: Annotated[str, typer.Option(help="schema, esol or agent.")] = "schema",
    file: Annotated[
        Path,
        typer.Option(
            "--file", metavar="FILE", parser=nonempty_path, help="Endpoints file to write."
        ),
    ] = Path("endpoints.txt"),
) -> None:
    """Serve a simulated fleet on this machine until interrupted."""
    from .servers import serve_simulated

    fields = {"nodes": nodes, "port": port, "addressing": addressing}
    serve_simulated(fields | {"model": model, "responder": responder}, file)


@app.command()
@take_overrides("assignments")
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
            "--servers",
            metavar="DIR",
            parser=nonempty_path,
            help="Servers folder: one endpoints file per node.",
        ),
    ],
    host: Annotated[
        str | None, typer.Option("--host", metavar="NAME", help="Host name of this node.")
    ] = None,
    *,
    changes: Overrides,
) -> None:
    """Run the model servers of this node (section node) until interrupted."""
    from .servers import serve_node

    serve_node(config, changes, servers, host)


def main() -> None:
    """Run the command line; report each fanfold error as one message and an exit code."""
    try:
        app()
    except FanfoldError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            _exit_quietly()
        print_messages([f"Error: {error.message}"])
        sys.exit(_exit_code(error))
    except BrokenPipeError:
        _exit_quietly()
    except Exception as error:  # noqa: BLE001 - a bug in fanfold: show the whole traceback
        print_traceback(error)
        sys.exit(EXIT_OTHER)


def _exit_quietly() -> NoReturn:
    """Exit without a message: the reader of stdout has closed it, e.g. ``head``."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())  # else Python's flush at exit fails
    sys.exit(EXIT_OTHER)


def _exit_code(error: FanfoldError) -> int:
    if isinstance(error, ConfigurationError):
        return EXIT_USAGE
    if isinstance(error, BudgetExhaustedError):
        return EXIT_BUDGET
    return EXIT_INTERRUPTED if isinstance(error, RunStoppedError) else EXIT_OTHER
