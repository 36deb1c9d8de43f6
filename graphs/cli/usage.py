"""A run's jobs in words and tables, for ``status``, ``cost`` and the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show_jobs(facts: Mapping[str, Any], console: Console) -> None:
    """Print what :func:`~fanfold.graphs.campaign.campaign` returned, one row per job."""
    table = Table("job", "state", "nodes", "began", "ended", "items")
    for job in facts["jobs"]:
        row = [job["job"], job["state"], job["nodes"], _time(job["began"]), _time(job["ended"])]
        items = "" if job["items"] is None else f"{job['items']:,}"
        table.add_row(*map(str, row), items)
    console.print(table)
    _print(_lines(facts), console)


def show_use(facts: Mapping[str, Any], console: Console) -> None:
    """Print how well the jobs used their nodes, as a table."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    jobs = facts["jobs_by_scheduler"] + facts["jobs_by_fanfold"]
    table.add_row("jobs that have begun", f"{jobs:,}", "")
    paid, useful = facts["node_hours"], facts["useful"]
    table.add_row("node-hours of jobs", f"{paid:,.3f}", "")
    for name in ("busy", "idle"):
        hours = facts[f"{name}_node_hours"]
        table.add_row(f"  {name}", f"{hours:,.3f}", f"{hours / (paid or 1):.1%}")
    table.add_row(
        "  useful: batch full", f"{useful['share'] * paid:,.3f}", f"{useful['share']:.1%}"
    )
    for cause, part in useful["lost"].items():
        table.add_row(f"  lost: {cause}", f"{part * paid:,.3f}", f"{part:.1%}")
    console.print(table)
    _print(_sources(facts), console)


def in_words(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines for the end of a run."""
    jobs = facts["jobs_by_scheduler"] + facts["jobs_by_fanfold"]
    yield f"Jobs: {jobs:,} so far, {_hours(facts)}"
    if useful := facts.get("useful"):
        yield f"Useful share: {_share(useful)}"


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"site {facts['site']}; {_hours(facts)}"
    if facts["scheduler_says"]:
        yield f"the scheduler does not tell: {facts['scheduler_says']}"
    if facts["ends"]:
        yield f"no further job: {facts['ends']}"
    if useful := facts.get("useful"):
        yield f"useful share {_share(useful)}"


def _sources(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield whose numbers these are, and why there are others."""
    useful = facts["useful"]
    yield "node-hours held: while the run itself works; its jobs have them from begin to end"
    yield f"node-hours by {_whose(facts)}; use by {_by(useful)}: {_full(useful)}"
    if facts["scheduler_says"]:
        yield f"the scheduler does not tell: {facts['scheduler_says']}"


def _hours(facts: Mapping[str, Any]) -> str:
    words = f"{facts['node_hours']:,.3f} node-hours of jobs by {_whose(facts)}"
    if "busy_node_hours" not in facts:
        return words
    return f"{words}, {facts['busy_node_hours']:,.3f} busy, {facts['idle_node_hours']:,.3f} idle"


def _whose(facts: Mapping[str, Any]) -> str:
    if not facts["jobs_by_scheduler"]:
        return "fanfold's own times"
    if not facts["jobs_by_fanfold"]:
        return "the scheduler's times"
    jobs = facts["jobs_by_scheduler"] + facts["jobs_by_fanfold"]
    return (
        f"the scheduler's times of {facts['jobs_by_scheduler']:,} of {jobs:,} jobs, else fanfold's"
    )


def _share(useful: Mapping[str, Any]) -> str:
    lost = ", ".join(f"{cause} {part:.1%}" for cause, part in useful["lost"].items() if part)
    return (
        f"{useful['share']:.1%} of the node-hours by {_by(useful)}: {_full(useful)}; "
        f"the rest: {lost or 'nothing'}"
    )


def _full(useful: Mapping[str, Any]) -> str:
    places = useful["full_batch_items"]
    return f"a server with at least nine tenths of {places:,} items at once"


def _by(useful: Mapping[str, Any]) -> str:
    counted, other = useful["jobs_by_servers_counts"], useful["jobs_by_journal"]
    if not counted:
        return "the journal"
    if not other:
        return "the servers' own counts"
    return f"the servers' own counts ({counted:,} of {counted + other:,} jobs, else the journal)"


def _print(lines: Iterator[str], console: Console) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _time(text: str | None) -> str:
    return "" if text is None else text[5:16].replace("T", " ")
