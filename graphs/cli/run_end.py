"""How the end of a session of a run is shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...backends.budget.cost import describe_cost
from ...backends.cluster.chain import chain_file
from ...backends.core.errors import EXIT_BUDGET, EXIT_INTERRUPTED
from ...backends.core.terminal import count_nouns
from ..run.console import print_json, print_messages
from ..run.rich_console import Terminal
from ..run.run_result import RunResult
from . import status
from .evaluation_text import (
    describe_evaluation,
    evaluation_facts,
    get_evaluations,
    show_evaluations,
)
from .options import OutputMode
from .tables import show_aggregate


def print_result(
    result: RunResult, output: OutputMode, pilot: Mapping[str, Any] | None = None
) -> int:
    """Print how a session ended; return the exit code.

    An interrupted session reports only the node-hours of its jobs: utilization takes too long.

    Args:
        result: The end of the session.
        output: How the command prints.
        pilot: What a pilot before it has measured.
    """
    path, whole = result.folder.path, result.exit_code != EXIT_INTERRUPTED
    if output.as_json:
        first = {} if pilot is None else {"pilot": pilot}
        jobs = _report_jobs(path, whole)
        print_json(
            {
                "run": result.run_id,
                "folder": str(path),
                **result.progress,
                **first,
                **({} if result.cost is None else result.cost.to_json()),
                "budget": result.budget,
                "seconds": result.seconds,
                "aggregate": result.aggregate,
                **(evaluation_facts(result.folder) if _is_finished(result) else {}),
                **_batch_files(result),
                **({} if jobs is None else {"chain": jobs}),
                **status.silence_facts(result.folder),
                **status.extension_facts(result.folder.read_provenance()),
                "exit_code": result.exit_code,
            }
        )
        return result.exit_code
    if not output.quiet:
        show_aggregate(result.aggregate, result.simulated, Terminal())
        if _is_finished(result):
            show_evaluations(get_evaluations(result.folder), Terminal())
    print_messages(_last_lines(result, output.quiet))
    if (jobs := _report_jobs(path, whole)) is not None:
        print_messages(list(status.job_lines(jobs)))
    return result.exit_code


def _report_jobs(path: Path, utilization: bool) -> dict[str, Any] | None:
    if not chain_file(path).read().jobs:
        return None
    from ..jobs.usage import job_report_offline  # imports the schedulers, which few runs need

    return job_report_offline(path, utilization=utilization)


def _is_finished(result: RunResult) -> bool:
    return result.exit_code not in {EXIT_BUDGET, EXIT_INTERRUPTED}


def _last_lines(result: RunResult, quiet: bool) -> list[str]:
    progress, folder = result.progress, result.folder
    kind = "SIMULATED: " if result.simulated else ""
    reused = f"{count_nouns(progress['reused'], 'answer')} reused, " * (progress["reused"] > 0)
    wasted = progress["tokens"]["wasted"]
    bound = "at most " if result.cost is not None and result.cost.usage.lost_tokens else ""
    lines = [
        f"{kind}{progress['done']:,} done, {progress['failed']:,} failed of "
        f"{progress['items']:,} in {result.seconds:,.1f} s; "
        f"{count_nouns(progress['requests'], 'request')}, "
        f"{reused}{progress['tokens']['prompt']:,} + {progress['tokens']['completion']:,} tokens"
        + (f", {bound}{wasted:,} wasted" if wasted else "")
    ]
    if result.cost is not None:
        lines += describe_cost(result.cost, result.budget)
    lines += result.open_batches
    lines += status.describe_silence(folder)
    if result.exit_code == EXIT_BUDGET:
        lines.append(f"Paused: {result.reason}")
        lines.append(
            f"Resume with a higher limit: fanfold resume {folder.path} {_raise_options(result)}"
        )
        return lines
    if result.exit_code == EXIT_INTERRUPTED:
        lines.append(f"Interrupted: {result.reason}")
        lines.append(f"Resume with: fanfold resume {folder.path}")
        return lines
    if files := _batch_files(result):
        lines += [f"{name.capitalize()}: {path}" for name, path in files.items()]
        return lines
    if result.simulated or quiet:
        lines += describe_evaluation(folder)
    lines.append(f"Results: {folder.results}")
    if not result.simulated and folder.evaluation.exists():
        lines.append(f"Evaluation: {folder.evaluation}")
    if progress["failed"]:
        lines.append(f"Failed items and their errors: {folder.failures}")
        lines.append(
            f"With remedies and examples: fanfold failures {shlex.quote(str(folder.path))}"
        )
    return lines


def _batch_files(result: RunResult) -> dict[str, str]:
    """Return the output files in OpenAI's batch format, by name."""
    batch = result.batch
    files = {} if batch is None else {"output": batch.output, "errors": batch.errors}
    return {name: path for name, path in files.items() if path is not None}


def _raise_options(result: RunResult) -> str:
    """Return the options that raise the limits of the run."""
    return " ".join(f"--budget-{name.replace('_', '-')} N" for name in result.budget)
