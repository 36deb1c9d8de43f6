"""Status, cost and failures of a pipeline, by stage."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from ...backends.budget.cost import describe_cost, group_usage, read_budget
from ...backends.budget.price import read_price
from ...backends.core.errors import ConfigurationError
from ...backends.core.money import UsageTotals
from ...backends.storage.run_folder import RunFolder, get_run_ids, open_folder, read_state
from ...configs.loader import load_config
from ...nodes.operators import Cascade
from ..run.console import print_json, print_lines, print_messages
from ..run.next_steps import FINISHED
from ..run.pipeline_report import (
    LevelState,
    PipelineState,
    StageState,
    find_next_command,
    read_pipeline,
    read_stage_budget,
)
from ..run.rich_console import Terminal, print_message
from ..run.stage_folder import (
    find_models,
    find_run,
    list_levels,
    list_stage_runs,
    read_operator,
)
from .failures import show_failures
from .options import COST_BY
from .stage_findings import show_pipeline_findings
from .status import (
    grouped_columns,
    print_missing_price,
    report_jobs,
    row_json,
    show_jobs,
    total_table,
)
from .tables import Column, make_table

_BY_STAGE: Final = "stage"


def show_pipeline_status(path: Path, as_json: bool, stage: str | None = None) -> None:
    """Show the progress of a pipeline, one row for each stage.

    Args:
        path: Its folder.
        as_json: Print JSON.
        stage: Show only this stage.

    Raises:
        ConfigurationError: The settings cannot be read, e.g. because a variable is not set.
        JournalError: A journal or a spend log is damaged.
    """
    folder = open_folder(path)
    about = folder.read_provenance()
    found = whole = read_pipeline(folder, load_config(folder.settings))
    if stage is not None:
        found = replace(whole, stages=tuple(s for s in whole.stages if s.stage.name == stage))
    state = read_state(folder, about)
    budget = read_budget(folder, found.cost)
    jobs = report_jobs(path, utilization=False)
    command = find_next_command(folder, about, whole, budget) if jobs is None else None
    counts = found.count_questions()
    if as_json:
        print_json(
            {
                "run": about["run"],
                "name": about["name"],
                "state": state,
                "simulated": about["simulated"],
                "model": find_models(folder, about),
                **counts,
                "stages": [stage.to_json() for stage in found.stages],
                **found.cost.to_json(),
                "budget": budget,
                "sessions": len(about["sessions"]),
                "next_command": command,
                **({} if jobs is None else {"chain": jobs}),
            }
        )
        return
    console = Terminal()
    if about["simulated"]:
        console.print(Text("simulated: true", style="bold"))
    for part in make_table(_columns(found), console.width):
        console.print(part)
    show_pipeline_findings(found, bool(about["simulated"]), console)
    print_messages([f"state: {state}", *describe_cost(found.cost, budget)])
    print_messages(
        f"{where}budget.{name}: {limit['spent']:,g} of {limit['cap']:,g}"
        for where, limits in _list_budgets(found, budget)
        for name, limit in limits.items()
    )
    if jobs is not None:
        show_jobs(jobs, console)
    if found.failed:
        print_messages([f"failures with examples: fanfold failures {shlex.quote(str(path))}"])
    if command is not None:
        print_message(console, f"continue with: {command}")


def _list_budgets(
    found: PipelineState, budget: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the budget of the pipeline, and those of stages that have begun, with their names."""
    yield "", budget
    for one in found.stages:
        if one.state != "waiting":
            yield f"stage {one.stage.name}: ", read_stage_budget(one)


def _columns(found: PipelineState) -> list[Column]:
    rows = list(_iter_rows(found))
    counts = found.count_questions()
    usage = UsageTotals.total(one.usage for one in found.stages)
    sums = (counts["items"], counts["done"], counts["failed"], usage.requests, usage.tokens)
    rows.append(("all questions", "", *(f"{number:,}" for number in sums), ""))
    return [
        Column("stage", [row[0] for row in rows], is_key=True),
        Column("state", [row[1] for row in rows]),
        *(
            Column(head, [row[at] for row in rows], is_number=True)
            for at, head in enumerate(("items", "done", "failed", "requests", "tokens"), start=2)
        ),
        Column("not passed on", [row[7] for row in rows]),
    ]


def _iter_rows(found: PipelineState) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each stage, and below an operator those of its levels."""
    for one in found.stages:
        operator = one.stage.config.operator
        name = one.stage.name if operator is None else f"{one.stage.name} ({operator.op})"
        items = "" if one.items is None else f"{one.items:,}"
        usage = one.usage
        yield (
            name,
            one.state,
            items,
            f"{one.results:,}",
            f"{one.failed:,}",
            f"{usage.requests:,}",
            f"{usage.tokens:,}",
            _left_out(one),
        )
        for number, run in enumerate(one.runs if operator is not None else (), start=1):
            yield (
                f"{one.stage.name}/{number} ({run.level})",
                FINISHED if run.is_finished else "begun",
                f"{run.items:,}",
                f"{run.done:,}",
                f"{run.failed:,}",
                f"{run.usage.requests:,}",
                f"{run.usage.tokens:,}",
                "",
            )


def _left_out(one: StageState) -> str:
    counts = one.passed_on or {}
    words = (("failed", "failed"), ("unselected", "not selected"))
    return ", ".join(f"{counts[key]:,} {text}" for key, text in words if counts.get(key))


def show_pipeline_cost(path: Path, by: str | None, as_json: bool) -> None:
    """Show the cost of a pipeline over all its sessions, by stage or another key.

    Raises:
        ConfigurationError: The grouping does not exist, or the settings cannot be read.
        JournalError: A journal or a spend log is damaged.
    """
    if by is not None and by not in (*COST_BY, _BY_STAGE):
        known = ", ".join((*COST_BY, _BY_STAGE))
        raise ConfigurationError(f"--by {by}: choose one of {known}")
    folder = open_folder(path)
    about = folder.read_provenance()
    found = read_pipeline(folder, load_config(folder.settings))
    if by in (None, _BY_STAGE):
        rows = [(one.stage.name, one.usage) for one in found.stages]
    else:
        rows = sorted(_group(folder, str(by)).items(), key=lambda one: one[0])
    cost, running = found.cost, folder.is_in_use()
    if as_json:
        print_json(
            {
                "run": about["run"],
                "simulated": about["simulated"],
                "running": running,
                "requests": cost.usage.requests,
                **cost.to_json(),
                "budget": read_budget(folder, cost),
                by or _BY_STAGE: [row_json(name, spent, cost.priced) for name, spent in rows],
            }
        )
        return
    console = Terminal()
    if about["simulated"]:
        console.print(Text("simulated: true", style="bold"))
    columns = grouped_columns(by or _BY_STAGE, [*rows, ("total", cost.usage)], cost.priced)
    for part in make_table(columns, console.width, framed=False):
        console.print(part)
    if by is None:
        console.print(total_table(cost, running))
    prices = [read_price(run.read_provenance()) for run in list_stage_runs(folder)]
    if prices and not any(prices):
        print_missing_price(about)


def _group(folder: RunFolder, by: str) -> dict[str, UsageTotals]:
    """Return the usage of all runs of a pipeline by a key."""
    groups = dict[str, UsageTotals]()
    for run in list_stage_runs(folder):
        about = run.read_provenance()
        ids, items = get_run_ids(about), about["input"]["items"]
        for key, spent in group_usage(run.journal, ids, items, by, about["model"]).by_key.items():
            groups.setdefault(key, UsageTotals()).merge(spent)
    return groups


def show_stage_failures(
    path: Path, stage: str | None, error_class: str | None, as_json: bool
) -> None:
    """Show the failures of one stage or level, or of all that have any.

    Raises:
        ConfigurationError: There is no such stage, or no item failed with the class.
        JournalError: A journal is damaged.
    """
    if stage is not None:
        show_failures(find_run(path, stage), error_class, as_json)
        return
    folder = open_folder(path)
    failed = [one for one in _list_failing(folder) if _count_failed(one, error_class)]
    if not failed:
        which = "" if error_class is None else f" with {error_class}"
        print_messages([f"{path}: no item failed{which}"])
    for one in failed:
        if not as_json:
            key = str(one.path.relative_to(folder.path)).removeprefix("stages/")
            print_lines([f"stage {key.replace('/levels/', ', level ')}"])
        show_failures(one.path, error_class, as_json)


def _list_failing(folder: RunFolder) -> Iterator[RunFolder]:
    """Yield the runs that ask the model, and the results of operators, which may fail too."""
    for name in folder.read_provenance()["stages"]:
        stage = RunFolder(folder.stages / name)
        operator = read_operator(stage.path)
        runs = [] if operator is None else list(list_levels(stage.path))
        if operator is None or operator["op"] != Cascade.op:  # whose failures are in its levels
            runs.append(stage)
        yield from (run for run in runs if run.provenance.exists())


def _count_failed(run: RunFolder, error_class: str | None) -> int:
    found = LevelState.read(run).failed_by_class
    return sum(found.values()) if error_class is None else found.get(error_class, 0)
