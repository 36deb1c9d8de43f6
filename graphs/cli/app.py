"""The fanfold command line: commands, options and exit codes."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

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
from ..run.console import print_messages, print_traceback, setup_logging
from . import jobs, setup
from .options import (
    ASK_AGAIN,
    BUDGET_OPTIONS,
    COST_BY,
    RUN_OPTIONS,
    SAMPLE_ITEMS,
    Group,
    OutputMode,
    argument,
    flag,
    nonempty,
    number_option,
    path_option,
    take_config,
    take_folder,
    take_json,
    take_out,
    take_output,
    take_overrides,
    take_pilot,
    take_stage,
    take_yes,
    text_option,
)

if TYPE_CHECKING:
    from ...configs.overrides import Overrides

_SHOWN_LOGGERS: Final = (
    "fanfold.backends.discovery.connect.choice",
    "fanfold.backends.batch.transport.events",
)
"""Loggers that are always shown: what ``endpoints: auto`` chose, and what happens to batches."""


def _show_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from ...backends.core.messages import own_version

        print(f"fanfold {own_version()}")
        context.exit()


@click.group(cls=Group, context_settings={"show_default": True})
@flag("--verbose", "-v", about="Show the log.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def app(verbose: bool) -> None:
    """Map-reduce LLM inference on HPC, as a LangGraph graph."""
    level = logging.INFO if verbose else logging.WARNING
    setup_logging(level, _SHOWN_LOGGERS)


def folder_is_pipeline(path: Path) -> bool:
    """Return True if a run folder is that of a pipeline of stages."""
    from ...backends.storage.run_folder import open_folder

    return open_folder(path).is_pipeline


@app.command()
@take_config
@take_out
@take_overrides(*RUN_OPTIONS)
@take_pilot
@take_yes
@path_option(
    "extends",
    "--from",
    metavar="DIR",
    about="Take over the finished items of this run whose question is the same.",
)
@click.option(
    "--ask-again",
    metavar="|".join(ASK_AGAIN),
    help="With --from: finished items to ask again; default: by what has changed.",
)
@text_option(
    "--only",
    metavar="CONDITIONS",
    about="With --from: only the items that meet these conditions, e.g. 'failed' or "
    "'output.score > 0.8'.",
)
def run(  # noqa: PLR0913 - click passes one argument per option
    *,
    config: str,
    out: Path | None,
    changes: Overrides,
    output: OutputMode,
    pilot: int | None,
    yes: bool,
    extends: Path | None,
    ask_again: str | None,
    only: str | None,
) -> int:
    """Run a batch, or resume it if the run folder exists."""
    from .run import run_or_resume

    changes = replace(changes, pilot=pilot, yes=yes)
    changes = replace(changes, extends=extends, ask_again=ask_again, only=only)
    return run_or_resume(config, out, changes, output)


@app.command()
@take_folder
@take_overrides(*RUN_OPTIONS)
def resume(folder: Path, changes: Overrides, output: OutputMode) -> int:
    """Resume a run: process only its unfinished items."""
    from .resume import resume_folder

    return resume_folder(folder, changes, output)


@app.command()
@argument("source", "IN", "A file in OpenAI's batch format.")
@argument("target", "OUT", "Output file; lines are added as they end.")
@click.option(
    "--endpoints",
    metavar="URLS|FILE|simulated|auto",
    multiple=True,
    help="Endpoints that serve the model; URLs may be repeated.",
)
@text_option("--config", metavar="FILE", about="Settings, without input and task.")
@path_option("--errors", about="Output file for failed lines; default: OUT.")
@path_option("--folder", metavar="DIR", about="Run folder; default: OUT.fanfold.")
@click.option(
    "media_hosts",
    "--allowed-media-domains",
    metavar="HOST",
    multiple=True,
    help="Host from which audio (file_url) may be fetched; may be repeated.",
)
@take_overrides(
    "checkpointer",
    "assignments",
    "as_json",
    "quiet",
    "retry_failed",
    "metrics_port",
    *BUDGET_OPTIONS,
)
@take_pilot
@take_yes
def batch(  # noqa: PLR0913 - click passes one argument per option
    *,
    source: Path,
    target: Path,
    endpoints: Sequence[str],
    config: str | None,
    errors: Path | None,
    folder: Path | None,
    media_hosts: Sequence[str],
    changes: Overrides,
    output: OutputMode,
    pilot: int | None,
    yes: bool,
) -> int:
    """Process a file in OpenAI's batch format, or resume it."""
    from .batch import BatchFileNames, run_batch

    changes = replace(changes, pilot=pilot, yes=yes)
    files = BatchFileNames(source, target, errors, folder, tuple(media_hosts))
    return run_batch(files, config, list(endpoints), changes, output)


@app.command()
@take_folder
@take_json
@flag("--endpoints", about="Show statistics per endpoint.")
@flag("--usage", about="Add the node utilization of its jobs.")
@number_option("--batch", about="With --usage: concurrent items per server.")
@text_option(
    "--stage",
    metavar="NAME[/LEVEL]",
    about="Of a pipeline: only this stage, or a level of its operator.",
)
def status(  # noqa: PLR0913 - click passes one argument per option
    *,
    folder: Path,
    as_json: bool,
    endpoints: bool,
    usage: bool,
    batch: int | None,
    stage: str | None,
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
@argument("folder", "[DIR]", "A folder of runs, or a run folder.", required=False, default=Path())
@take_json
def ls(folder: Path, as_json: bool) -> None:
    """List the runs in a folder, the latest first."""
    from .runs import list_runs

    list_runs(folder, as_json)


@app.command()
@take_folder
@text_option(
    "--stage",
    metavar="NAME[/LEVEL]",
    about="Of a pipeline: this stage or level; default: the one that is worked on.",
)
@take_json
def watch(folder: Path, stage: str | None, as_json: bool) -> None:
    """Show what the endpoints of a run do over time; Ctrl-C leaves, and the run goes on."""
    from ..run.stage_folder import find_run
    from .watch import watch_run

    watch_run(folder if stage is None else find_run(folder, stage), as_json)


@app.command()
@take_folder
@click.option("--columns", metavar="A,B,…", help="Columns, e.g. id,output.score,smiles.")
@flag("--failed", about="Show failed items only.")
@text_option(
    "--sort",
    metavar="[-]COLUMN",
    about="Rows by a column, e.g. output.score; -output.score has the highest first.",
)
@number_option("--limit", default=20, about="Number of rows.")
@take_stage
@take_json
def show(  # noqa: PLR0913 - click passes one argument per option
    *,
    folder: Path,
    columns: str | None,
    failed: bool,
    sort: str | None,
    limit: int,
    stage: str | None,
    as_json: bool,
) -> None:
    """Show rows of the results so far."""
    from ..run.stage_folder import find_run
    from .show import show_rows

    folder = find_run(folder, stage)
    show_rows(folder, columns, "failed" if failed else None, limit, as_json, sort)


@app.command()
@take_folder
@click.option(
    "error_class",
    "--class",
    metavar="NAME",
    help="List the ids of the items with this error class.",
)
@take_stage
@take_json
def failures(folder: Path, error_class: str | None, stage: str | None, as_json: bool) -> None:
    """Show the error classes of a run, each with a remedy and an example."""
    if folder_is_pipeline(folder):
        from .stage_status import show_stage_failures

        show_stage_failures(folder, stage, error_class, as_json)
    else:
        from .failures import show_failures

        show_failures(folder, error_class, as_json)


@app.command()
@argument("a", "A", "A run folder.")
@argument("b", "B", "Folder of a run over the same items.")
@click.option(
    "--field",
    metavar="NAME",
    multiple=True,
    help="Field of the answers to compare; may be repeated; default: all in both.",
)
@click.option(
    "form",
    "--format",
    metavar="FORM",
    help="text, json or html; default: by the suffix, or text.",
)
@number_option("--limit", least=0, about="Items to list per field; default: 20, in files 1000.")
@take_output
def compare(  # noqa: PLR0913 - click passes one argument per option
    *,
    a: Path,
    b: Path,
    field: Sequence[str],
    form: str | None,
    limit: int | None,
    target: Path | None,
) -> None:
    """Compare two runs over the same items: agreement, changes, gold figures, cost, latency."""
    from .compare import compare_folders

    compare_folders((a, b), list(field), form, limit, target)


@app.command()
@take_folder
@text_option(
    "--gold",
    metavar="COLUMN",
    about="Column with the gold values; default: the settings of the run.",
)
@text_option("--field", about="Field of the answer to compare.")
@path_option("--gold-file", about="File with the gold values; default: the input of the run.")
@text_option(
    "--gold-id",
    metavar="COLUMN",
    about="Column of that file with the ids of the items; default: that of the input.",
)
@take_json
def evaluate(  # noqa: PLR0913 - click passes one argument per option
    *,
    folder: Path,
    gold: str | None,
    field: str | None,
    gold_file: Path | None,
    gold_id: str | None,
    as_json: bool,
) -> None:
    """Compare the answers of a run with gold values: accuracy, F1, kappa, errors."""
    from .evaluate import GoldOptions, evaluate_run

    evaluate_run(folder, GoldOptions(gold, field, gold_file, gold_id), as_json)


@app.command()
@take_folder
@path_option("target", "-o", "--output", about="File to write; default: DIR/report.html.")
@text_option(
    "--stage",
    metavar="NAME[/LEVEL]",
    about="Of a pipeline: only this stage, or a level of its operator.",
)
def report(folder: Path, target: Path | None, stage: str | None) -> None:
    """Write a run as one HTML page: finding, items, failures, endpoints, settings."""
    from ..run.stage_folder import find_run
    from .report import show_report

    show_report(folder if stage is None else find_run(folder, stage), target)


@app.command()
@take_folder
@click.option(
    "--by", metavar="KEY", help=f"One row per {', '.join(COST_BY[:-1])} or {COST_BY[-1]}."
)
@take_json
def cost(folder: Path, by: str | None, as_json: bool) -> None:
    """Show the cost of a run over all its sessions: tokens, dollars, node-hours."""
    if folder_is_pipeline(folder):
        from .stage_status import show_pipeline_cost

        show_pipeline_cost(folder, by, as_json)
    else:
        from .status import show_cost

        show_cost(folder, by, as_json)


@app.command()
@take_config
@take_overrides("endpoints", "assignments")
@take_json
def endpoints(config: str, changes: Overrides, as_json: bool) -> int:
    """List the endpoints and their current state; exit with 2 if none serves the model."""
    _expect_short_command()
    from .endpoints import list_endpoints

    return list_endpoints(config, changes, as_json)


@app.command()
@take_folder
@click.option(
    "form",
    "--format",
    metavar="FORM",
    help="jsonl, csv or parquet; default: by the suffix, or jsonl.",
)
@take_output
@flag("--safe-csv", about="With csv: put ' before cells that start a formula.")
@flag("--prompt", about="Add the messages of each item (column prompt).")
@flag("--raw", about="Add the text of the answer where the run kept it (column raw).")
@flag("--samples", about="One row per sample, if each row was asked several times.")
@take_stage
def results(  # noqa: PLR0913 - click passes one argument per option
    *,
    folder: Path,
    form: str | None,
    target: Path | None,
    safe_csv: bool,
    prompt: bool,
    raw: bool,
    samples: bool,
    stage: str | None,
) -> None:
    """Write the results so far, one row per finished item, in input order."""
    _expect_short_command()
    from .export import export_results

    optional = [name for name, is_given in (("prompt", prompt), ("raw", raw)) if is_given]
    export_results(folder, form, target, safe_csv, optional, samples=samples, stage=stage)


@app.command()
@take_config
@take_overrides("input_path", "limit", "endpoints", "assignments", *BUDGET_OPTIONS)
@number_option("--sample", default=SAMPLE_ITEMS, about="Number of prompts to render and count.")
@path_option("--like", metavar="DIR", about="A similar run to take answer lengths and times from.")
@take_json
def check(config: str, changes: Overrides, sample: int, like: Path | None, as_json: bool) -> None:
    """Validate the config and estimate tokens, cost and time, without calling the model."""
    _expect_short_command()
    from .check import check_config

    check_config(config, changes, sample, like, as_json)


@app.command()
@take_output
def schema(target: Path | None) -> None:
    """Write the JSON Schema of a configuration file, for editors."""
    from ...configs.preset_files import read_settings_schema

    setup.write_text(read_settings_schema(), target)


@app.command()
@number_option("--nodes", default=8, about="Number of simulated servers.")
@number_option("--port", least=0, most=65535, default=0, about="First port; 0 picks free ports.")
@click.option(
    "--addressing",
    metavar="KIND",
    default="port",
    help="How addresses differ: port, path (on one port), addr (loopback addresses, Linux only).",
)
@click.option("--model", metavar="TEXT", default="simulated-8b", help="Model name.")
@click.option(
    "--responder",
    metavar="NAME",
    default="schema",
    help="What computes the answers: schema, labels, esol or agent.",
)
@path_option("--file", default=Path("endpoints.txt"), about="Endpoints file to write.")
def simulate(  # noqa: PLR0913 - click passes one argument per option
    *,
    nodes: int,
    port: int,
    addressing: str,
    model: str,
    responder: str,
    file: Path,
) -> None:
    """Serve a simulated fleet on this machine until interrupted."""
    from .servers import serve_simulated

    fields = {"nodes": nodes, "port": port, "addressing": addressing}
    serve_simulated(fields | {"model": model, "responder": responder}, file)


@app.command()
@argument("config", "CONFIG|DIR", "A YAML file, a preset or a run folder.", type=nonempty)
@path_option(
    "--servers",
    metavar="DIR",
    required=True,
    about="Servers folder: one endpoints file per node.",
)
@click.option("--host", metavar="NAME", help="Host name of this node.")
@take_overrides("assignments")
def serve(config: str, servers: Path, host: str | None, changes: Overrides) -> None:
    """Run the model servers of this node (section node) until interrupted."""
    from .servers import serve_node

    serve_node(config, changes, servers, host)


for _command in (jobs.submit, jobs.cancel, jobs.pack, jobs.chain, setup.presets, setup.globus):
    app.add_command(_command)


YOUNG_OBJECTS: Final = 10_000
"""New objects after which Python looks for garbage; 700, its default, cost 3 % of a run."""


_SHORT_COMMAND_OBJECTS: Final = 200_000
"""The same for commands that mostly end within a second: about what their modules consist of."""


def _expect_short_command() -> None:
    """Avoid work that pays off in long commands only; call it before their modules are imported.

    NumPy, which Arrow imports, starts a thread on each core for algebra that these commands do not
    need. On two cores that nearly doubles the CPU time of the import, and login nodes limit the
    number of threads.
    """
    gc.set_threshold(_SHORT_COMMAND_OBJECTS)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Run the command line; report each fanfold error as one message and an exit code."""
    _open_closed_streams()
    gc.set_threshold(YOUNG_OBJECTS)
    atexit.register(gc.freeze)  # the last collection would free nothing, and takes half a second
    try:
        sys.exit(app.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        _print_usage(error)
        sys.exit(error.exit_code)
    except click.Abort as error:
        sys.exit(EXIT_INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else EXIT_OTHER)
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


def _open_closed_streams() -> None:
    """Open the standard streams that the shell has closed (``2>&-``).

    Python has None in their place, and the next file that is opened would get their number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - stays open
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _print_usage(error: click.ClickException) -> None:
    """Print what is wrong with a command line, without control characters."""
    text = io.StringIO()
    error.show(text)
    print_messages(text.getvalue().splitlines())


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
