"""What a report says about a run, read from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import yaml
from markupsafe import Markup

from ...backends.budget.cost import Cost, read_cost, sum_costs
from ...backends.core.errors import ConfigurationError, JournalError
from ...backends.core.fields import FieldPath
from ...backends.storage.endpoints_table import FILE_NAME, read_endpoints, sum_sessions
from ...backends.storage.journal import Journal, describe_lost_files, list_lost_files
from ...backends.storage.journal_file import ItemCounts
from ...backends.storage.results_schema import ResultRow
from ...backends.storage.run_folder import (
    RunFolder,
    StagePlace,
    get_run_ids,
    read_evaluation,
    read_state,
)
from ...backends.storage.timeline import FILE_NAME as TIMELINE_FILE
from ...configs.raw_settings import get_at_path, read_settings
from ...nodes.operators import Cascade
from ..analysis.failures import describe_failures
from ..run.next_steps import continue_lines, find_next_command
from ..run.result_rows import ResultSource, open_result_source, read_prompts
from ..run.stage_folder import list_levels, read_operator
from .charts import Charts, load_charts
from .evaluation import make_evaluations
from .findings import Finding, FindingMaker
from .flags import RowFacts
from .molecules import SMILES_NAMES, open_drawing
from .operators import MOST_RESULTS, make_operator_findings
from .rows import ReportRows, collect_rows, describe_constants
from .texts import format_seconds, parse_time, shorten, to_text
from .timeline import (
    Timeline,
    TimeUse,
    list_points,
    make_heat_map,
    measure_time_use,
    read_timeline,
)


@dataclass(frozen=True, slots=True)
class ReportData:
    """What a report says about a run.

    Attributes:
        about: Provenance of the run.
        state: Its state, as ``fanfold status`` says it.
        counts: Its items by state.
        cost: Its cost.
        settings: Its settings, and as text.
        settings_text: The settings as YAML.
        findings: The finding.
        rows: Rows of the table.
        constants: Role and text of the messages that all items share.
        failures: Error classes with examples.
        endpoints: Work of each endpoint over all sessions.
        timeline: The run over time, or None.
        time_use: Where the time went, or None.
        time_charts: Pictures of the run over time, by name.
        notices: What is missing, and why.
        steps: How the run continues.
        folder: The run folder.
        operator: Settings of the operator, if the run is its stage; else None.
        place: Place of the run in a pipeline, or None.
        sessions: Its sessions; of an operator, those of its levels.
        failed_questions: Failed questions of the levels of an operator that reduces.
    """

    about: Mapping[str, Any]
    state: str
    counts: ItemCounts
    cost: Cost
    settings: Mapping[str, Any]
    settings_text: str
    findings: Sequence[Finding]
    rows: ReportRows
    constants: Sequence[tuple[str, str]]
    failures: Sequence[Mapping[str, Any]]
    endpoints: Sequence[Mapping[str, Any]]
    timeline: Timeline | None
    time_use: TimeUse | None
    time_charts: Mapping[str, Markup]
    notices: Sequence[str]
    steps: Sequence[str]
    folder: Path
    operator: Mapping[str, Any] | None = None
    place: StagePlace | None = None
    sessions: Sequence[Mapping[str, Any]] = ()
    failed_questions: int = 0


def read_report(folder: RunFolder) -> ReportData:
    """Read what a report says about a run; the run may be going on.

    Raises:
        ConfigurationError: The settings cannot be read.
        JournalError: A file of the run is damaged.
    """
    about, state = folder.read_provenance(), read_state(folder, folder.read_provenance())
    settings = read_settings(folder.settings).data
    notices = list[str]()
    with _open_source(folder, notices) as source, open_drawing() as draw:
        rank = _find_rank(settings, source)
        rows = collect_rows(source, RowFacts(rank))
        counts = source.journal.count_items()
        charts = load_charts()
        operator = read_operator(folder.path)
        columns = {} if rows.chosen else {column.name: column for column in rows.columns}
        fields = {} if operator else columns  # fields of results of operators are no findings
        smiles = _find_smiles(settings)
        maker = FindingMaker(charts, draw, smiles, fields)
        evaluation = read_evaluation(folder) or {}
        if refused := evaluation.get("refused"):
            notices.append(f"No evaluation: {refused}")
        aggregate, report = _read_aggregate(folder)
        findings = [
            *make_operator_findings(
                report, _read_first(source) if report else (), maker, operator or {}
            ),
            *make_evaluations(evaluation.get("evaluations") or (), charts),
            *maker.make(aggregate),
        ]
        failures = describe_failures(folder, source.journal, source.store)
        levels = list(list_levels(folder.path)) if operator else []
        ends = [_read_level(level) for level in levels]
        cost = (
            sum_costs(cost for cost, _ in ends)
            if operator
            else read_cost(folder, get_run_ids(about), source.journal.usage_by_session)
        )
        failed_questions = 0
        if (
            operator and operator["op"] != Cascade.op
        ):  # the failures of a cascade are those of items
            failed_questions = sum(failed for _, failed in ends) - int(report.get("splits", 0))
        if lost := list_lost_files(folder.journal):
            notices.append(describe_lost_files(lost, source.journal))
        prompt = None if source.prompts is None else source.prompts.prompt
    if charts is None:
        notices.append(
            "No charts: they need the extra 'report' (pip install 'fanfold[report]'); "
            "tables show the same numbers"
        )
    has_smiles = any(name.casefold() in smiles for name in columns)
    if draw is None and has_smiles:
        notices.append("No molecules: drawing SMILES needs the extra 'chem'")
    timeline = read_timeline(folder.path / TIMELINE_FILE)
    use = None if timeline is None else measure_time_use(timeline, list_session_times(about))
    return ReportData(
        about,
        state,
        counts,
        cost,
        settings,
        yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True),
        findings,
        rows,
        describe_constants(prompt),
        [_shorten_failure(row) for row in failures.rows],
        sum_sessions(read_endpoints(folder.path / FILE_NAME)),
        timeline,
        use,
        _draw_times(timeline, use, charts),
        [*notices, *filter(None, [failures.notice])],
        list(_list_steps(folder, about, counts, cost)),
        folder.path,
        operator,
        folder.read_place(),
        [one for level in levels for one in level.read_provenance()["sessions"]]
        if operator
        else about["sessions"],
        failed_questions,
    )


def _read_level(level: RunFolder) -> tuple[Cost, int]:
    """Return the cost of a level, and its failed questions."""
    about = level.read_provenance()
    run = get_run_ids(about)
    with Journal(level.journal, run, about["input"]["items"]) as journal:
        return read_cost(level, run, journal.usage_by_session), journal.count_items().failed


def _read_first(source: ResultSource) -> list[ResultRow]:
    return list(islice(source.iter_rows(), MOST_RESULTS))


def list_session_times(
    about: Mapping[str, Any],
) -> list[tuple[datetime | None, datetime | None]]:
    """Return start and end of each session, as far as they are known."""
    return [
        (parse_time(one.get("started")), parse_time(one.get("ended"))) for one in about["sessions"]
    ]


def _draw_times(
    timeline: Timeline | None, use: TimeUse | None, charts: Charts | None
) -> dict[str, Markup]:
    """Return pictures of a run over time."""
    if timeline is None or charts is None:
        return {}
    heat = make_heat_map(timeline)
    found = {
        "time": charts.draw_timeline(*list_points(timeline)),
        "endpoints": charts.draw_heat_map(heat.cells, heat.names, heat.width, heat.unit),
    }
    if use is not None:
        bars = [(name, seconds, format_seconds(seconds)) for name, seconds in use.parts.items()]
        found["use"] = charts.draw_bars(bars, "where the time went")
    return found


@contextmanager
def _open_source(folder: RunFolder, notices: list[str]) -> Iterator[ResultSource]:
    """Open the results with the messages, or without them if these cannot be rendered here."""
    optional = ["prompt"]
    try:
        _check_prompt_variables(folder)
    except ConfigurationError as error:
        notices.append(f"No prompts of items: {error.message}")
        optional = []
    with open_result_source(folder, optional) as source:
        yield source


def _check_prompt_variables(folder: RunFolder) -> None:
    read_prompts(read_settings(folder.settings).data, str(folder.settings))


def _find_rank(settings: Mapping[str, Any], source: ResultSource) -> FieldPath | None:
    """Return the field that ranks the items: of the first ranking, else the first number."""
    for entry in settings.get("reduce") or ():
        if isinstance(entry, dict) and entry.get("op") == "top_k" and entry.get("field"):
            path = FieldPath.parse(str(entry["field"]))
            if not path.is_many:  # else an item has several ranks
                return path
    for name, kind in source.layout.output.parts:
        if source.layout.output.kind == "struct" and kind.kind in {"number", "integer"}:
            return FieldPath("output", (name,))
    return None


def _find_smiles(settings: Mapping[str, Any]) -> frozenset[str]:
    named = get_at_path(settings, ("input", "smiles"))
    return SMILES_NAMES | ({named.casefold()} if isinstance(named, str) else set())


def _read_aggregate(folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the aggregate of a run, and the report of its operator if it has one."""
    try:
        found = orjson.loads(folder.aggregate.read_bytes())
        aggregate, report = list(found["aggregate"]), dict(found.get("report") or {})
    except FileNotFoundError:  # the run has not ended
        return [], {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{folder.aggregate}: cannot be read: {error}") from error
    return [one for one in aggregate if isinstance(one, dict)], report


def _shorten_failure(row: Mapping[str, Any]) -> dict[str, Any]:
    example = row["example"]
    size = example["response_bytes"]
    parts = [(f"request, {m.get('role')}", m.get("content")) for m in example["messages"] or ()]
    if example["row"] is not None:
        parts.append(("row of the input", example["row"]))
    shown = [(name, shorten(to_text(text))) for name, text in parts]
    if example["response"] is not None:
        response = shorten(example["response"], None if size is None else f"{size:,} bytes")
        shown.append(("response", response or "(empty)"))
    return {
        "name": row["class"],
        "count": row["count"],
        "remedy": row["remedy"],
        "id": shorten(str(example["id"])),
        "error": shorten(str(example["error"])),
        "endpoint": example["endpoint"],
        "texts": shown,
    }


def _list_steps(
    folder: RunFolder, about: Mapping[str, Any], counts: ItemCounts, cost: Cost
) -> Iterator[str]:
    with Journal(folder.journal, get_run_ids(about), about["input"]["items"]) as journal:
        classes = list(journal.count_failures())
    command = find_next_command(folder, about, counts, cost, classes)
    if command is not None and counts.open:
        yield f"continue the run: {command}"
    if classes:
        yield from continue_lines(folder, classes, folder.is_in_use())
