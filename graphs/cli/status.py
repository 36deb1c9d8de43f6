"""``fanfold status`` and ``cost``, as tables and JSON."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...backends.batch.files import BatchFolder, describe_open_batches, summarize_batches
from ...backends.budget.cost import (
    Cost,
    estimate_total_cost,
    format_dollars,
    format_node_hours,
    format_unaccounted,
    format_usd,
    group_usage,
    read_budget,
    read_cost,
    tokens_json,
)
from ...backends.budget.price import read_price
from ...backends.cluster.chain import chain_file
from ...backends.core.errors import ConfigurationError, JournalError
from ...backends.core.money import MS_PER_HOUR, NANO_PER_USD, Amount, UsageTotals
from ...backends.core.silence import SILENT_S, name_endpoints
from ...backends.core.types import Json
from ...backends.storage.journal import Journal, describe_lost_files, list_lost_files
from ...backends.storage.journal_file import ItemCounts
from ...backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    open_folder,
    read_aggregate,
    read_silent_endpoints,
    read_state,
)
from ..run.console import format_count, print_json, print_messages
from ..run.next_steps import (
    FINISHED,
    continue_lines,
    find_commands_by_class,
    find_next_command,
)
from ..run.rich_console import Terminal, print_message
from .evaluation_text import describe_evaluation, evaluation_facts
from .options import COST_BY
from .tables import Column, format_cell, make_table, show_aggregate


def show_jobs(facts: Mapping[str, Any], console: Console) -> None:
    """Print a :func:`~fanfold.graphs.jobs.usage.job_report`, one row per job."""
    jobs = facts["jobs"]
    columns = [
        Column("job", [str(job["job"]) for job in jobs], is_key=True),
        Column("state", [str(job["state"]) for job in jobs]),
        Column("nodes", [str(job["nodes"]) for job in jobs], is_number=True),
        Column("began", [_time(job["began"]) for job in jobs], is_number=True),
        Column("ended", [_time(job["ended"]) for job in jobs], is_number=True),
        Column("items", [_items(job["items"]) for job in jobs], is_number=True),
    ]
    for part in make_table(columns, console.width):
        console.print(part)
    _print(_lines(facts), console)


def show_utilization(facts: Mapping[str, Any], console: Console) -> None:
    """Print the node utilization of the jobs as a table."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    jobs = facts["jobs_by_scheduler"] + facts["jobs_by_fanfold"]
    table.add_row("jobs started", f"{jobs:,}", "")
    useful, unknown = facts["useful"], facts["unknown_node_hours"]
    table.add_row("node-hours of jobs", f"{facts['node_hours']:,.3f}", "")
    known = facts["busy_node_hours"] + facts["idle_node_hours"]
    if useful["share"] is not None:
        for name in ("busy", "idle"):
            hours = facts[f"{name}_node_hours"]
            table.add_row(f"  {name}", f"{hours:,.3f}", f"{hours / (known or 1):.1%}")
        parts = {"useful: batch full": useful["share"]}
        parts |= {f"lost: {cause}": part for cause, part in useful["lost"].items()}
        for name, part in parts.items():
            table.add_row(f"  {name}", f"{part * known:,.3f}", f"{part:.1%}")
    if unknown:
        table.add_row("  unknown", f"{unknown:,.3f}", "")
    console.print(table)
    _print(_sources(facts), console)


def job_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the job lines printed at the end of a run."""
    jobs = facts["jobs_by_scheduler"] + facts["jobs_by_fanfold"]
    yield f"Jobs: {jobs:,} so far, {_hours(facts)}"
    if "useful" in facts:
        yield f"Useful share: {_share(facts)}"


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"site {facts['site']}; {_hours(facts)}"
    if facts["scheduler_says"]:
        yield f"no data from the scheduler: {facts['scheduler_says']}"
    if facts["ends"]:
        yield f"no further job: {facts['ends']}"
    if "useful" in facts:
        yield f"useful share: {_share(facts)}"


def _sources(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sources of the numbers, and why the scheduler's are missing."""
    yield "node-hours held: while the run works; node-hours of jobs: from job start to job end"
    yield f"node-hours by {_whose(facts)}; use {_measured(facts)}"
    if facts["scheduler_says"]:
        yield f"no data from the scheduler: {facts['scheduler_says']}"


def _hours(facts: Mapping[str, Any]) -> str:
    words = f"{facts['node_hours']:,.3f} node-hours of jobs by {_whose(facts)}"
    if "useful" not in facts:
        return words
    if facts["useful"]["share"] is not None:
        words += f", {facts['busy_node_hours']:,.3f} busy, {facts['idle_node_hours']:,.3f} idle"
    unknown = facts["unknown_node_hours"]
    return words + (f", {unknown:,.3f} unknown" if unknown else "")


def _whose(facts: Mapping[str, Any]) -> str:
    if not facts["jobs_by_scheduler"]:
        return "fanfold's own times"
    if not facts["jobs_by_fanfold"]:
        return "the scheduler's times"
    jobs = facts["jobs_by_scheduler"] + facts["jobs_by_fanfold"]
    return (
        f"the scheduler's times of {facts['jobs_by_scheduler']:,} of {jobs:,} jobs, else fanfold's"
    )


_UNKNOWN: Final = "unknown: the servers of these nodes reported no counts"


def _share(facts: Mapping[str, Any]) -> str:
    useful = facts["useful"]
    if useful["share"] is None:
        return _measured(facts)
    lost = ", ".join(f"{cause} {part:.1%}" for cause, part in useful["lost"].items() if part)
    return (
        f"{useful['share']:.1%} of the node-hours {_measured(facts)}; the rest: {lost or 'nothing'}"
    )


def _measured(facts: Mapping[str, Any]) -> str:
    """Return what the use of the nodes is measured by, or why it is unknown."""
    useful, unknown = facts["useful"], facts["unknown_node_hours"]
    counted, other = useful["jobs_by_servers_counts"], useful["jobs_without_counts"]
    if useful["share"] is None:
        return _UNKNOWN if other else "unknown: no job has begun"
    jobs = f" of {counted:,} of {counted + other:,} jobs" if other else ""
    words = f"by the servers' own counts{jobs}: "
    words += f"servers with at least 90 % of {useful['full_batch_items']:,} items in flight"
    return words + (f"; {unknown:,.3f} node-hours {_UNKNOWN}" if other else "")


def _print(lines: Iterator[str], console: Console) -> None:
    for line in lines:
        print_message(console, line)


def _items(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _time(text: str | None) -> str:
    return "" if text is None else text[5:16].replace("T", " ")


def show_status(path: Path, as_json: bool, usage: bool = False, batch: int | None = None) -> None:
    """Show the progress of a run, and its jobs if it has any."""
    folder = open_folder(path)
    about = folder.read_provenance()
    ids, items, live = get_run_ids(about), about["input"]["items"], folder.is_in_use()
    with Journal(folder.journal, ids, items, live=live) as journal:
        counts, spent = journal.count_items(), journal.total_usage()
        failures = journal.count_failures()
        cost = read_cost(folder, get_run_ids(about), journal.usage_by_session)
        if lost := list_lost_files(folder.journal):
            print_messages([describe_lost_files(lost, journal)])
    state = read_state(folder, about)
    facts = {
        "run": about["run"],
        "name": about["name"],
        "state": state,
        "simulated": about["simulated"],
        "model": about["model"],
        "items": about["input"]["items"],
        **samples_facts(about),
        "done": counts.done,
        "failed": counts.failed,
        "failed_by_class": failures,
        "open": counts.open,
        "requests": spent.requests,
        "reused": spent.reused,
    }
    facts |= extension_facts(about) | silence_facts(folder)
    batches = BatchFolder(folder.batches).read()
    if batches:
        facts["batches"] = summarize_batches(batches)
    aggregate = _read_final_aggregate(folder, about)
    jobs = report_jobs(path, usage, batch)
    command = find_next_command(folder, about, counts, cost, failures) if jobs is None else None
    if as_json:
        costs = cost.to_json() | {
            "budget": read_budget(folder, cost),
            "total_to_finish": estimate_total_cost(folder, cost, counts),
        }
        chain = {} if jobs is None else {"chain": jobs}
        sessions = {"sessions": len(about["sessions"])}
        found = {"aggregate": aggregate} if aggregate else {}
        found |= evaluation_facts(folder)
        commands = {
            "next_command": command,
            "next_by_class": find_commands_by_class(folder, failures),
        }
        print_json(facts | costs | sessions | found | commands | chain)
        return
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    facts.pop("silent", None)  # as a message below
    shown = facts | _costs(folder, cost, counts) | {"sessions": len(about["sessions"])}
    for key, value in shown.items():
        if key == "failed_by_class":
            for name, count in failures.items():
                table.add_row(f"  {name}", _format_value(count))
        else:
            table.add_row(key, _format_value(value))
    Terminal().print(table)
    show_aggregate(aggregate, bool(about["simulated"]), Terminal())
    print_messages(
        [
            *describe_silence(folder),
            *describe_open_batches(batches),
            *describe_evaluation(folder),
        ]
    )
    if jobs is not None:
        show_jobs(jobs, Terminal())
    last = about["sessions"][-1] if about["sessions"] else {}
    is_over = not counts.open and last.get("outcome") == FINISHED and not folder.is_in_use()
    _print(_hints(folder, failures, command, is_over and jobs is None), Terminal())


def silence_facts(folder: RunFolder) -> dict[str, Any]:
    """Return the endpoints that answered nothing, each with the begin of its silence, if any."""
    silent = read_silent_endpoints(folder)
    return {"silent": {name: _utc(since) for name, since in silent.items()}} if silent else {}


def describe_silence(folder: RunFolder) -> Iterator[str]:
    """Yield a line that names the endpoints which answered nothing, if there are any."""
    if silent := read_silent_endpoints(folder):
        since, minutes = _utc(min(silent.values())), SILENT_S / 60
        yield (
            f"WARNING: {name_endpoints(silent)} answered nothing for {minutes:.0f} minutes of work "
            f"and more, the first since {since}, while others answered; look at those whose jobs "
            f"have not ended. "
            f"Counts: fanfold status {shlex.quote(str(folder.path))} --endpoints"
        )


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def report_jobs(path: Path, utilization: bool, batch: int | None = None) -> dict[str, Any] | None:
    """Return a report of the jobs of a run or pipeline; None if it never had any."""
    if not chain_file(path).read().jobs:
        return None
    from ..jobs.usage import job_report  # imports the schedulers, which few runs need

    return job_report(path, utilization, batch)


def samples_facts(about: Mapping[str, Any]) -> dict[str, int]:
    """Return how many items each row of the input has, by the provenance; nothing if one."""
    samples = about["input"].get("samples", 1)
    return {"samples": samples} if samples > 1 else {}


def _read_final_aggregate(folder: RunFolder, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the aggregate of a finished run; nothing if another session has begun since."""
    last = about["sessions"][-1] if about["sessions"] else {}
    if last.get("outcome") != FINISHED or folder.is_in_use():
        return []
    try:
        return read_aggregate(folder)
    except JournalError as error:
        print_messages([error.message])
        return []


def extension_facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run took over from another one, by its provenance; nothing if it did not."""
    known = about.get("from")
    if known is None:
        return {}
    return {"from": known["run"], "kept": {key: known[key] for key in ("done", "failed")}}


def _hints(
    folder: RunFolder, failures: Collection[str], command: str | None, is_over: bool
) -> Iterator[str]:
    """Yield how to look at the failures, and how the run continues."""
    if failures:
        yield f"failures with examples: fanfold failures {shlex.quote(str(folder.path))}"
    if is_over and failures:
        yield from continue_lines(folder, failures, running=False)
    elif command is not None:
        yield f"continue with: {command}"


def _costs(folder: RunFolder, cost: Cost, counts: ItemCounts) -> dict[str, Any]:
    """Return the cost of a run for display, without what is neither counted nor limited."""
    limits = read_budget(folder, cost)
    tokens = tokens_json(cost.usage)
    if lost := tokens.pop("lost"):
        tokens["lost at most"] = lost
    shown: dict[str, Any] = {"tokens": tokens}
    if cost.nano_usd is not None:
        shown["cost"] = format_dollars(cost)
    shown["nodes"] = format_node_hours(cost)
    for name, limit in limits.items():
        shown[f"budget.{name}"] = f"{_number(limit['spent'])} of {_number(limit['cap'])}"
    if more := format_unaccounted(cost):
        shown["in doubt"] = more
    if counts.open:
        for name, total in estimate_total_cost(folder, cost, counts).items():
            shown[f"{name} to finish"] = f"about {total:,} in total"
    return shown


def _number(value: float) -> str:
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.2f}" if value >= 1 else f"{value:.4g}"


def _format_value(value: Any) -> Text:
    if isinstance(value, dict):
        return Text(", ".join(f"{_format_value(inner)} {name}" for name, inner in value.items()))
    if isinstance(value, bool):
        return Text(str(value).lower())
    if isinstance(value, int):
        return Text(f"{value:,}")
    return format_cell(value, most=None)


def show_cost(path: Path, by: str | None, as_json: bool) -> None:
    """Show the cost of a run over all its sessions, however they ended.

    Raises:
        ConfigurationError: The run folder or the grouping does not exist.
        JournalError: The journal or a spend log is damaged.
    """
    if by is not None and by not in COST_BY:
        raise ConfigurationError(f"--by {by}: choose one of {', '.join(COST_BY)}")
    folder = open_folder(path)
    about = folder.read_provenance()
    run, items, model = get_run_ids(about), about["input"]["items"], about["model"]
    groups = group_usage(folder.journal, run, items, by, model)
    cost = read_cost(folder, run, groups.sessions)
    rows = sorted(groups.by_key.items(), key=lambda one: (by != "day" and -one[1].tokens, one[0]))
    jobs = report_jobs(path, utilization=True)
    if as_json:
        print_json(
            {
                "run": about["run"],
                "simulated": about["simulated"],
                "running": folder.is_in_use(),
                "requests": cost.usage.requests,
                **cost.to_json(),
                "budget": read_budget(folder, cost),
            }
            | ({by: [row_json(name, spent, cost.priced) for name, spent in rows]} if by else {})
            | ({} if jobs is None else {"chain": jobs})
        )
        return
    console = Terminal()
    if about["simulated"]:
        console.print(Text("simulated: true", style="bold"))
    if by is not None:
        columns = grouped_columns(by, [*rows, ("total", cost.usage)], cost.priced)
        for part in make_table(columns, console.width, framed=False):
            console.print(part)
    else:
        console.print(total_table(cost, folder.is_in_use()))
    print_missing_price(about)
    if jobs is not None:
        show_utilization(jobs, console)


def print_missing_price(about: Mapping[str, Any]) -> None:
    """Say why a run has no cost in dollars, if it has no price, and which setting gives one."""
    if read_price(about) is None:
        print_messages(
            [
                "no dollars: this run began without a price. For new runs set model.price, e.g. "
                "--set 'model.price={prompt: 0.5, completion: 1.5}' (dollars per million tokens) "
                "or --set 'model.price={node_hour: 2}' (nodes paid by time)"
            ]
        )


def row_json(name: str, spent: UsageTotals, priced: bool) -> dict[str, Json]:
    """Return a group of costs as plain data."""
    return {
        "name": name,
        "requests": spent.requests,
        "tokens": tokens_json(spent),
        "usd": spent.nano_usd / NANO_PER_USD if priced else None,
        "wasted_usd": spent.wasted_nano_usd / NANO_PER_USD if priced else None,
    }


def grouped_columns(by: str, rows: list[tuple[str, UsageTotals]], priced: bool) -> list[Column]:
    """Return groups of costs as the columns of a table."""
    largest = max(spent.nano_usd for _, spent in rows)
    usd = [format_usd(one.nano_usd, largest) for _, one in rows]
    numbers = {
        "requests": [spent.requests for _, spent in rows],
        "prompt": [spent.prompt_tokens for _, spent in rows],
        "cached": [spent.cached_tokens for _, spent in rows],
        "completion": [spent.completion_tokens for _, spent in rows],
        "wasted": [spent.wasted_tokens for _, spent in rows],
    }
    return [
        Column(by, [name for name, _ in rows], is_key=True),
        *(
            Column(head, [format_count(value) for value in values], is_number=True)
            for head, values in numbers.items()
        ),
        *([Column("USD", usd, is_number=True)] if priced else []),
    ]


def total_table(cost: Cost, running: bool) -> Table:
    """Return a cost as a table, one row for each kind; without a column of dollars if unknown."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    if cost.nano_usd is not None:
        table.add_column(no_wrap=True, justify="right")
    for name, amount, nano in _total_rows(cost, running):
        if cost.nano_usd is None:
            table.add_row(name, amount)
        else:
            usd = "" if nano is None else f"{format_usd(nano, cost.nano_usd)} USD"
            table.add_row(name, amount, usd)
    return table


def _total_rows(cost: Cost, running: bool) -> Iterator[tuple[str, str, int | None]]:
    """Yield the rows of a total: name, amount, and nano-dollars."""
    spent, held, doubt = cost.usage, cost.node_time, cost.unaccounted
    tokens = spent.nano_usd if cost.priced else None
    bound = "at most " if spent.lost_tokens else ""
    yield "requests", f"{spent.requests:,}", None
    yield "prompt tokens", f"{spent.prompt_tokens:,}", None
    yield "  of them cached", f"{spent.cached_tokens:,}", None
    yield "completion tokens", f"{spent.completion_tokens:,}", None
    yield "lost answers, at most", f"{spent.lost_tokens:,}", None
    yield "all tokens", f"{bound}{spent.tokens:,}", tokens
    yield "  useful", f"{spent.useful_tokens:,}", tokens and spent.useful_nano_usd
    wasted = spent.wasted_nano_usd if cost.priced else None
    yield "  wasted", f"{bound}{spent.wasted_tokens:,}", wasted
    price = held.nano_usd or None
    yield "node-hours held", f"{held.node_ms / MS_PER_HOUR:,.3f}", price
    yield "  idle", f"{held.idle_ms / MS_PER_HOUR:,.3f}", price and held.idle_nano_usd
    if cost.nano_usd is not None:
        yield "tokens and nodes", "", cost.nano_usd
    if doubt != Amount():
        yield ("reserved or in doubt" if running else "in doubt"), format_unaccounted(cost), None
