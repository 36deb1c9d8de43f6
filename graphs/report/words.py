"""Words of a report: what its template says, from the data of the run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ...backends.budget.cost import Cost, format_dollars, format_unaccounted
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import StagePlace
from ...configs.raw_settings import get_at_path
from ..run.console import format_count
from .data import ReportData
from .flags import FLAGS
from .rows import ReportRows
from .texts import NONE, format_seconds, parse_time, shorten, to_text

MOST_ENDPOINTS: Final = 200
"""Endpoints that the table of endpoints lists."""

_MOST_SKIPPED: Final = 20
_MOST_NAMES: Final = 3

ENDPOINT_HEAD: Final = (
    "endpoint", "state", "calls", "failed", "prompt tokens", "completion tokens",
    "median s", "90 % s", "99 % s", "opened", "hedges",
)  # fmt: skip
ENDPOINT_NUMBERS: Final = (False, False, *[True] * 9)

SESSION_HEAD: Final = ("session", "started (UTC)", "took", "outcome", "host", "versions")


def describe_time(sessions: Sequence[Mapping[str, Any]], are_levels: bool = False) -> str:
    """Return when the run worked, and for how long."""
    if not sessions:
        return "not started"
    first, last = parse_time(sessions[0].get("started")), parse_time(sessions[-1].get("ended"))
    begun = "" if first is None else f"{first:%d %B %Y, %H:%M} UTC".lstrip("0")
    spent = 0.0
    for one in sessions:
        start, end = parse_time(one.get("started")), parse_time(one.get("ended"))
        if start is not None and end is not None:
            spent += (end - start).total_seconds()
    more = f" in {len(sessions)} sessions" if len(sessions) > 1 and not are_levels else ""
    return begun + (f" · {format_seconds(spent)}{more}" if spent or last else "")


def describe_cost(cost: Cost) -> tuple[str, str]:
    """Return the cost in dollars, and what is to be said about it."""
    doubt = format_unaccounted(cost)
    note = f"in doubt: at most {doubt}" if doubt else ""
    if cost.nano_usd is None:
        return "no price", note or "neither tokens nor nodes have a price"
    first, _, rest = format_dollars(cost).partition(", of which ")
    return first, "; ".join(filter(None, (rest, note)))


def describe_flags(rows: ReportRows) -> list[tuple[str, int, str]]:
    """Return the flags that occur, with counts and meanings."""
    return [(name, rows.flags[name], text) for name, text in FLAGS.items() if name in rows.flags]


def describe_question(data: ReportData) -> list[tuple[str, str]]:
    """Return the templates of the messages, as the settings have them, or those of an operator."""
    settings, operator = data.settings, data.operator
    if operator is not None:
        names = ("system", "prompt", "text")
        return [(name, str(operator[name]).strip()) for name in names if operator.get(name)]
    if get_at_path(settings, ("input", "format")) == "openai_batch":
        return []
    task = settings.get("task") or {}
    if isinstance(given := task.get("messages"), list):
        return [(str(one.get("role")), str(one.get("content"))) for one in given]
    found = [("system", task.get("system")), ("user", task.get("prompt"))]
    return [(role, str(text).strip()) for role, text in found if text]


def describe_state(data: ReportData) -> str:
    """Return the state of a run without its reason, which may be a sentence."""
    return data.state.partition(": ")[0]


def list_failures(data: ReportData) -> list[list[str]]:
    """Return the failed items by error class, each with the error of one item."""
    return [[one["name"], f"{one['count']:,}", one["error"]] for one in data.failures]


def list_missing(data: ReportData) -> Iterator[str]:
    """Yield what the run lacks."""
    counts, found = data.counts, data.about["input"]
    if counts.open:
        are = "has" if counts.open == 1 else "have"
        why = f": {data.state}" if describe_state(data) != data.state else ""
        yield f"{counts.open:,} of {count_nouns(found['items'], 'item')} {are} not ended{why}"
        if data.settings.get("reduce"):
            yield "the aggregate (reduce): it is computed when all items have ended"
    if counts.failed:
        have = "has" if counts.failed == 1 else "have"
        yield f"{count_nouns(counts.failed, 'item')} failed and {have} no answer"
    if data.failed_questions and data.place is not None:
        root = shlex.quote(os.fspath(data.place.root))
        questions = count_nouns(data.failed_questions, "question")
        yield f"the answers to {questions} of the operator, which failed: fanfold failures {root}"
    if skipped := found.get("skipped_total"):
        were = "was" if skipped == 1 else "were"
        yield f"{count_nouns(skipped, 'row')} of the input {were} skipped"


def list_skipped(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the first skipped rows with reasons."""
    skipped = about["input"].get("skipped") or ()
    return [(shorten(one["id"]), shorten(one["reason"])) for one in skipped[:_MOST_SKIPPED]]


def describe_lead(data: ReportData) -> str:
    """Return what was asked of what, by which model and endpoints, and when."""
    about = data.about
    endpoints = [str(one["endpoint"]) for one in data.endpoints]
    items = about["input"]["items"]
    if data.operator is not None:
        made = f"{count_nouns(items, 'result')} of the operator {data.operator['op']}"
        if (given := count_given(about)) is not None:
            source = f" of stage {name}" if (name := about["selection"].get("from")) else ""
            made += f" from {count_nouns(given, 'item')}{source}"
        asked = [f"asked of {shorten(str(about['model']))}"] if data.sessions else []
        asked += [describe_time(data.sessions, are_levels=True)] if data.sessions else []
        return " · ".join([made, *asked])
    parts = [
        f"{_count_asked(data)} of {shorten(str(about['input']['source']))}",
        f"asked of {shorten(str(about['model']))}",
        *[f"at {_name_some(endpoints)}" for _ in endpoints[:1]],
        describe_time(data.sessions),
    ]
    return " · ".join(parts)


def _count_asked(data: ReportData) -> str:
    """Return the number of items; if rows were asked several times, that of the rows."""
    items, samples = data.about["input"]["items"], get_at_path(data.settings, ("task", "samples"))
    if isinstance(samples, int) and samples > 1:
        return f"{count_nouns(items // samples, 'row')}, {samples:,} samples of each,"
    return count_nouns(items, "item")


def count_given(about: Mapping[str, Any]) -> int | None:
    """Return the number of items that an operator was given; None if it is not recorded."""
    passed_on = about.get("passed_on")
    return passed_on.get("passed") if isinstance(passed_on, Mapping) else None


def _name_some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,} endpoints"


def short(count: int) -> str:
    """Return a number in at most five characters."""
    return format_count(count)


def list_facts(data: ReportData) -> Iterator[tuple[str, str]]:
    """Yield what else was asked: answer, model and input."""
    task, model = data.settings.get("task") or {}, data.settings.get("model") or {}
    if data.operator is not None:
        yield from _list_operator_facts(data.operator)
        yield "Model", shorten(str(data.about["model"]))
        yield from _list_selection(data.about)
        return
    schema = task.get("schema")
    if isinstance(schema, Mapping):
        fields = schema.get("properties")
        names = ", ".join(map(str, fields)) if isinstance(fields, Mapping) else "JSON"
        yield "Answer", shorten(names)
    else:
        yield "Answer", "free text"
    if shots := task.get("examples"):
        yield (
            "Examples",
            f"{len(shots):,} before each question"
            if isinstance(shots, list)
            else (shorten(str(shots))),
        )
    yield "Model", shorten(str(data.about["model"]))
    for key, name in (("temperature", "Temperature"), ("max_tokens", "Limit of an answer")):
        if model.get(key) is not None:
            yield name, f"{model[key]} tokens" if key == "max_tokens" else str(model[key])
    endpoints = [str(one["endpoint"]) for one in data.endpoints]
    if endpoints:
        more = len(endpoints) - _MOST_NAMES
        yield "Endpoints", ", ".join(endpoints[:_MOST_NAMES]) + (f" and {more:,} more" * (more > 0))
    yield "Input", shorten(str(data.about["input"]["source"]))
    yield from _list_selection(data.about)
    if known := data.about.get("from"):
        yield "Taken over", f"{count_nouns(known['done'], 'answer')} of run {known['run']}"


def _list_selection(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield which results of the stage before are the items of a stage."""
    where = (about.get("selection") or {}).get("where")
    if where is not None:
        counts = about.get("passed_on") or {}
        total = sum(counts.values())
        yield "Items where", f"{shorten(str(where))} ({counts.get('passed', 0):,} of {total:,})"


def _list_operator_facts(operator: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings of an operator that are no texts of its questions."""
    yield "Operator", str(operator["op"])
    for name, value in operator.items():
        if name not in {"op", "system", "prompt", "text"} and value is not None:
            yield name.replace("_", " ").capitalize(), shorten(to_text(value))


def describe_levels(data: ReportData) -> str | None:
    """Return where the requests of an operator are shown; None for other runs."""
    if data.operator is None or data.place is None:
        return None
    command = f"fanfold report {shlex.quote(os.fspath(data.place.root))}"
    return (
        "An operator asks the model in levels, each of which is a run with a page of its own: "
        f"{command} --stage {data.place.stage}/1"
    )


def list_endpoints(data: ReportData) -> list[list[str]]:
    """Return the table of endpoints, the busiest first."""
    rows = sorted(data.endpoints, key=lambda one: -(one["calls"] or 0))[:MOST_ENDPOINTS]
    counts = ("calls", "failed", "prompt_tokens", "completion_tokens")
    times = ("latency_p50_s", "latency_p90_s", "latency_p99_s")
    return [
        [
            shorten(str(one["endpoint"])),
            str(one["state"]),
            *(f"{one[name] or 0:,}" for name in counts),
            *(NONE if one[name] is None else f"{one[name]:.3g}" for name in times),
            *(f"{one[name] or 0:,}" for name in ("opened", "hedges")),
        ]
        for one in rows
    ]


def list_commands(data: ReportData) -> list[tuple[str, str]]:
    """Return commands that export, repeat and extend the run."""
    if data.place is not None:
        return _list_stage_commands(data, data.place)
    path = shlex.quote(os.fspath(data.folder))
    settings = shlex.quote(os.fspath(data.folder / "run.yaml"))
    command = data.about["sessions"][0].get("command") if data.about["sessions"] else None
    begun = [("Begun with", shlex.join(map(str, command)))] if command else []
    return [
        *begun,
        ("All results", f"fanfold results {path} -o results.csv"),
        ("Repeat", f"fanfold run {settings} --out NEW"),
        ("Extend", f"fanfold run {settings} --from {path} --out NEW"),
        ("This page", f"fanfold report {path}"),
    ]


def _list_stage_commands(data: ReportData, place: StagePlace) -> list[tuple[str, str]]:
    """Return the commands of a stage or a level; the pipeline is what can be repeated."""
    root = shlex.quote(os.fspath(place.root))
    level = f"/{data.folder.name}" if data.folder.parent.name == "levels" else ""
    stage = f"--stage {place.stage}{level}"
    return [
        ("All results", f"fanfold results {root} {stage} -o results.csv"),
        ("All stages", f"fanfold status {root}"),
        ("Repeat", f"fanfold run {shlex.quote(os.fspath(place.root / 'run.yaml'))} --out NEW"),
        ("This page", f"fanfold report {root} {stage}"),
    ]


def list_sessions(about: Mapping[str, Any]) -> list[list[str]]:
    """Return the sessions of the run."""
    rows = list[list[str]]()
    for number, one in enumerate(about["sessions"], 1):
        start, end = parse_time(one.get("started")), parse_time(one.get("ended"))
        took = format_seconds((end - start).total_seconds()) if start and end else NONE
        versions = one.get("versions") or {}
        known = ", ".join(f"{name} {value}" for name, value in versions.items())
        rows.append(
            [
                str(number),
                f"{start:%Y-%m-%d %H:%M:%S}" if start else NONE,
                took,
                shorten(str(one.get("outcome") or "no end recorded")),
                shorten(str(one.get("host"))),
                f"{known}, Python {one.get('python')}",
            ]
        )
    return rows


def list_sections(data: ReportData) -> list[tuple[str, str]]:
    """Return the sections of the page: id and name."""
    failures = [("failures", "Failures")] if data.failures else []
    return [
        ("finding", "Finding"),
        ("question", "What was asked"),
        ("rows", "Items"),
        *failures,
        ("time", "Over time"),
        *[("endpoints", "Endpoints") for _ in range(data.operator is None)],
        ("again", "Settings and how to go on"),
    ]


def describe_time_use(data: ReportData) -> str:
    """Return ideal over actual time in words."""
    use = data.time_use
    if use is None:
        return ""
    return (
        f"Ideal over actual: {use.share:.0%}. The useful requests take "
        f"{format_seconds(use.ideal)} with {short(round(use.level))} requests in flight, the level "
        f"that the run reached; its sessions took {format_seconds(use.actual)}."
    )


TIME_PARTS: Final = {
    "useful requests": "requests whose answers count, at the level that the run reached",
    "failed requests": "requests that failed or were sent again",
    "start": "from the start of a session to its first request",
    "free slots": "fewer requests in flight than the run reached",
    "tail": "the last requests, when no further item waited",
    "end": "from the last request to the end of a session",
}


def list_time_parts(data: ReportData) -> list[list[str]]:
    """Return where the time went, as a table."""
    use = data.time_use
    if use is None:
        return []
    return [
        [name, format_seconds(seconds), f"{seconds / (use.actual or 1):.1%}", TIME_PARTS[name]]
        for name, seconds in use.parts.items()
    ]


def list_call_failures(data: ReportData) -> list[list[str]]:
    """Return the failed requests by error class."""
    failures = {} if data.timeline is None else data.timeline.failures
    return [[shorten(name), f"{count:,}"] for name, count in failures.items()]
