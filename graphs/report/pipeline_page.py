"""The page of a pipeline: all stages, what each has found, and links to the pages of stages."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from ...backends.budget.cost import Cost, read_budget
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import RunFolder, open_folder, read_state, write_bytes
from ...configs.loader import load_config
from ...configs.raw_settings import read_settings
from ..run.pipeline_report import PipelineState, StageState, find_next_command, read_pipeline
from ..run.stage_folder import find_models
from . import words
from .data import read_report
from .findings import Finding
from .page import render_page, render_template
from .texts import NONE, shorten

_HEAD: Final = (
    "stage", "what it does", "state", "items", "not passed on", "results", "failed", "requests",
    "tokens",
)  # fmt: skip
_NUMBERS: Final = (False, False, False, True, False, True, True, True, True)


@dataclass(frozen=True, slots=True)
class StagePart:
    """What the page of a pipeline says about a stage.

    Attributes:
        name: Its name.
        title: Its name, and that of its operator.
        findings: What it has found.
        link: Address of its own page, relative to this one; None if it is not written.
    """

    name: str
    title: str
    findings: Sequence[Finding]
    link: str | None


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """What the page of a pipeline says.

    Attributes:
        about: Its provenance.
        lead: Input, models and time.
        state: Its state.
        finished: Number of finished stages.
        counts: Questions of all stages, by state.
        failed: Failed items, results and questions.
        cost: Its cost.
        head: Names of the columns of the table of stages.
        rows: The table.
        numbers: Which of its columns are numbers.
        parts: The stages.
        notices: What is missing, and why.
        commands: How to go on.
        settings_text: The settings as YAML.
    """

    about: Mapping[str, Any]
    lead: str
    state: str
    finished: int
    counts: Mapping[str, int]
    failed: int
    cost: Cost
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[bool]
    parts: Sequence[StagePart]
    notices: Sequence[str]
    commands: Sequence[tuple[str, str]]
    settings_text: str


def write_pipeline_report(path: Path, target: Path | None = None) -> Path:
    """Write the report of a pipeline; return the file.

    Args:
        path: The folder of the pipeline.
        target: The file; None is ``report.html`` in the folder, beside a page for each stage in its
            folder, to which the file has links.

    Raises:
        ConfigurationError: The settings cannot be read.
        JournalError: A file of a stage is damaged, or the report cannot be written.
    """
    folder = open_folder(path)
    state, notices = read_pipeline(folder, load_config(folder.settings)), dict[str, None]()
    parts = [_write_part(stage, notices, write=target is None) for stage in state.stages]
    report = _make_report(folder, state, parts, list(notices))
    page = render_template("pipeline.html.j2", report, about=report.about)
    target = folder.report if target is None else target
    write_bytes(target, page)
    return target


def _write_part(stage: StageState, notices: dict[str, None], *, write: bool) -> StagePart:
    """Return what a page says about a stage, and write the page of its own."""
    run, operator = stage.stage.folder, stage.stage.config.operator
    title = stage.stage.name if operator is None else f"{stage.stage.name} ({operator.op})"
    if not run.provenance.exists():
        return StagePart(stage.stage.name, title, (), None)
    data = read_report(run)
    notices |= dict.fromkeys(data.notices)
    link = None
    if write:
        write_bytes(run.report, render_page(data))
        link = f"{run.path.parent.name}/{run.path.name}/{run.report.name}"
    return StagePart(stage.stage.name, title, data.findings, link)


def _make_report(
    folder: RunFolder, state: PipelineState, parts: Sequence[StagePart], notices: Sequence[str]
) -> PipelineReport:
    about = folder.read_provenance()
    found = about["input"]
    lead = (
        f"{count_nouns(len(parts), 'stage')} over {count_nouns(found['items'], 'item')} of "
        f"{shorten(str(found['source']))}",
        f"asked of {shorten(find_models(folder, about))}",
        words.describe_time(about["sessions"]),
    )
    command = find_next_command(folder, about, state, read_budget(folder, state.cost))
    return PipelineReport(
        about,
        " · ".join(lead),
        read_state(folder, about).partition(": ")[0],
        sum(one.state == "finished" for one in state.stages),
        state.count_questions(),
        state.failed,
        state.cost,
        _HEAD,
        [_make_row(one) for one in state.stages],
        _NUMBERS,
        parts,
        notices,
        list(_list_commands(folder, state, command)),
        yaml.safe_dump(
            dict(read_settings(folder.settings).data), sort_keys=False, allow_unicode=True
        ),
    )


def _make_row(stage: StageState) -> list[str]:
    config, usage = stage.stage.config, stage.usage
    counts = stage.passed_on or {}
    left = [
        f"{counts[key]:,} {name}"
        for key, name in (("failed", "failed"), ("unselected", "not selected"))
        if counts.get(key)
    ]
    return [
        config.name,
        "map" if config.operator is None else config.operator.op,
        stage.state,
        NONE if stage.items is None else f"{stage.items:,}",
        ", ".join(left),
        f"{stage.results:,}",
        f"{stage.failed + stage.failed_questions:,}",
        f"{usage.requests:,}",
        f"{usage.tokens:,}",
    ]


def _list_commands(
    folder: RunFolder, state: PipelineState, command: str | None
) -> Iterator[tuple[str, str]]:
    path = shlex.quote(os.fspath(folder.path))
    settings = shlex.quote(os.fspath(folder.settings))
    if command is not None:
        yield "Continue", command
    if state.failed:
        yield "Failures", f"fanfold failures {path}"
    yield "Results", f"fanfold results {path} --stage {state.last.stage.name} -o results.csv"
    yield "Repeat", f"fanfold run {settings} --out NEW"
    yield "Extend", f"fanfold run {settings} --from {path} --out NEW"
    yield "Page of a stage", f"fanfold report {path} --stage {state.last.stage.name}"
    yield "This page", f"fanfold report {path}"
