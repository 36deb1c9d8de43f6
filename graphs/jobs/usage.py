"""States, node-hours and utilization of a run's jobs, as plain data."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from ...backends.cluster.chain import (
    Job,
    JobChain,
    JobUsage,
    chain_file,
    list_job_usage,
)
from ...backends.cluster.schedulers import SCHEDULERS, JobState, Scheduler, SchedulerUsage
from ...backends.cluster.utilization import (
    JobServers,
    JobTime,
    Utilization,
    compute_utilization,
    read_job_servers,
)
from ...backends.core.errors import EXIT_DONE, EXIT_FAILURES, FanfoldError, JournalError
from ...backends.storage.run_folder import RunFolder, open_folder, write_json
from ...configs.raw_settings import get_at_path, read_settings

_SEQUENCES: Final = re.compile(r"--max-num-seqs[= ](\d+)")


def run_utilization(
    folder: RunFolder, hours: Sequence[JobUsage], batch: int | None = None
) -> Utilization:
    """Return the useful share of a run's jobs, from the counts of their servers.

    The size of a full batch comes from the settings (``limits.endpoint_streams``, or
    ``--max-num-seqs`` in ``node.serve``), else from what the servers reported.

    Args:
        folder: The run's folder.
        hours: The jobs.
        batch: Concurrent items per server; None takes it from the settings.

    Raises:
        JournalError: An event log of the servers cannot be read.
    """
    settings = read_settings(folder.settings).data
    instances = int(get_at_path(settings, ("node", "instances")) or 1)
    full_batch = batch or get_at_path(settings, ("limits", "endpoint_streams"))
    full_batch = full_batch or _parse_max_num_seqs(get_at_path(settings, ("node", "serve")))
    ordered = sorted(hours, key=lambda one: one.begin)
    servers = read_job_servers(
        job_servers_folder(folder), [(one.begin, one.end) for one in ordered]
    )
    jobs = [_job_time(*each, instances) for each in zip(ordered, servers, strict=True)]
    return compute_utilization(jobs, full_batch)


def last_activity(folder: RunFolder) -> float | None:
    """Return the last write of the run's servers or journal, in seconds since 1970."""
    logs, journal = job_servers_folder(folder) / "logs", folder.journal
    files = (*logs.glob("*.jsonl"), *journal.glob("*.jsonl"))
    return max((file.stat().st_mtime for file in files), default=None)


def job_servers_folder(folder: RunFolder) -> Path:
    """Return the folder where the nodes of a run's jobs record their servers."""
    return folder.path / "cluster" / "servers"


def _job_time(spent: JobUsage, servers: JobServers, instances: int) -> JobTime:
    return JobTime(
        nodes=spent.job.nodes,
        begin=spent.begin,
        end=spent.end,
        inside_s=spent.nodes * (spent.end - spent.begin),
        overhead_s=spent.nodes * spent.overhead_s,
        servers=spent.job.nodes * instances,
        was_stopped=spent.job.ended is not None
        and spent.job.code not in (EXIT_DONE, EXIT_FAILURES),
        is_measured=servers.is_measured,
        intervals=tuple(map(tuple, servers.intervals.values())),
    )


def _parse_max_num_seqs(command: str | None) -> int | None:
    """Return the value of ``--max-num-seqs`` in a command, or None."""
    found = _SEQUENCES.search(command or "")
    return int(found[1]) if found else None


_ASK_AGAIN_S: Final = 60.0


def job_report(
    path: Path, utilization: bool = False, batch: int | None = None
) -> dict[str, Any] | None:
    """Return a report of a run's jobs as plain data, or None if it never had any.

    Uses the scheduler's data if available; else the records of the chain, with the reason in
    ``scheduler_says``.

    Args:
        path: The run folder.
        utilization: Compute how busy the servers were and the useful share, which reads the event
            logs of the nodes.
        batch: Concurrent items per server; None takes it from the settings.

    Raises:
        JournalError: The chain's file cannot be read.
    """
    chain = chain_file(path).read()
    if not chain.jobs:
        return None
    answer = _get_answer(path, chain)
    return _build_report(path, chain, answer.states, answer.used, utilization, batch) | {
        "scheduler_says": answer.problem
    }


def job_report_offline(path: Path, *, utilization: bool) -> dict[str, Any] | None:
    """Return the report for the end of a session, without asking the scheduler.

    The scheduler may answer too slowly for the end of a job. The job that this process runs in
    counts until now.

    Raises:
        JournalError: The chain's file cannot be read.
    """
    chain = chain_file(path).read()
    if not chain.jobs:
        return None
    here = {os.environ.get(one.job_variable) for one in SCHEDULERS.values()}
    states: dict[str, JobState] = {j.id: "running" for j in chain.unfinished_jobs() if j.id in here}
    return _build_report(path, chain, states, {}, utilization, None) | {"scheduler_says": None}


def _build_report(  # noqa: PLR0913, PLR0917 - data, its sources, and options
    path: Path,
    chain: JobChain,
    states: Mapping[str, JobState],
    used: Mapping[str, SchedulerUsage],
    utilization: bool,
    batch: int | None,
) -> dict[str, Any]:
    folder = open_folder(path)
    last_seen = last_activity(folder) if any(j.began for j in chain.unfinished_jobs()) else None
    hours = list_job_usage(chain, used, states, time.time(), last_seen)
    facts: dict[str, Any] = {
        "site": chain.options["site"],
        "jobs": [_job(job, states.get(job.id)) for job in chain.jobs],
        "ends": chain.halt_reason,
        "node_hours": _hours(sum(s.node_s for s in hours)),
        "node_hours_by_scheduler": bool(hours) and all(s.by_scheduler for s in hours),
        "jobs_by_scheduler": sum(s.by_scheduler for s in hours),
        "jobs_by_fanfold": sum(not s.by_scheduler for s in hours),
    }
    return facts | _use(run_utilization(folder, hours, batch)) if utilization else facts


class _Answer(BaseModel):
    """What the scheduler said about the jobs of a run, kept in the run folder for a minute.

    Attributes:
        v: Version.
        at: When it was asked, in seconds since 1970.
        unfinished: The jobs whose state was asked for.
        begun: The jobs whose usage was asked for.
        states: The states.
        used: What the jobs used.
        problem: Why the scheduler did not answer, or None.
    """

    v: Literal[1] = 1
    at: float
    unfinished: list[str]
    begun: list[str]
    states: dict[str, JobState] = {}
    used: dict[str, SchedulerUsage] = {}
    problem: str | None = None


def _get_answer(path: Path, chain: JobChain) -> _Answer:
    """Return states and usage; ask the scheduler if the last answer is of more than a minute ago.

    Its administrators ask users to query it rarely, and ``status`` may run in a loop. After a new
    event of the chain it is asked at once if the event changes which jobs are of interest.
    """
    file = chain_file(path).path.with_name("scheduler.json")
    unfinished = [job.id for job in chain.unfinished_jobs()]
    asked = _Answer(
        at=time.time(),
        unfinished=unfinished,
        begun=[job.id for job in chain.jobs if job.began is not None],
    )
    with suppress(OSError, ValidationError):  # none yet, or of another version
        kept = _Answer.model_validate_json(file.read_bytes())
        same = (kept.unfinished, kept.begun) == (asked.unfinished, asked.begun)
        if same and 0 <= asked.at - kept.at < _ASK_AGAIN_S:
            return kept
    _ask_scheduler(SCHEDULERS[chain.options["scheduler"]], asked)
    with suppress(JournalError):  # the folder of somebody else is read only
        write_json(file, asked.model_dump())
    return asked


def _ask_scheduler(scheduler: Scheduler, answer: _Answer) -> None:
    """Fill in states and usage from the scheduler, and the error if it fails."""
    try:
        answer.states = scheduler.fetch_states(answer.unfinished)
        answer.used = scheduler.fetch_usage(answer.begun)
    except FanfoldError as error:
        answer.problem = error.message


def _job(job: Job, state: JobState | None) -> dict[str, Any]:
    return {
        "job": job.id,
        "state": _state(job, state),
        "nodes": job.nodes,
        "submitted": job.submitted,
        "began": job.began,
        "ended": job.ended,
        "exit_code": job.code,
        "items": job.finished_items if job.done is not None else None,
    }


def _state(job: Job, state: JobState | None) -> str:
    if job.ended is not None:
        return job.outcome or "ended"
    if job.foreign:
        return "of the run that this one was copied from"
    if state == "ended":
        return "lost" if job.began is not None else "gone before it began"
    return state or ("running?" if job.began is not None else "queued?")


def _use(share: Utilization) -> dict[str, Any]:
    """Return busy and idle node-hours, and the useful share of those that are measured."""
    useful, known = share.useful_share, share.measured_s or 1.0
    return {
        "busy_node_hours": _hours(share.busy_s),
        "idle_node_hours": _hours(share.measured_s - share.busy_s),
        "unknown_node_hours": _hours(share.unknown_s),
        "useful": {
            "share": None if useful is None else round(useful, 4),
            "full_batch_items": None if useful is None else share.full_batch,
            "lost": {cause: round(s / known, 4) for cause, s in share.lost_s.items()},
            "jobs_by_servers_counts": share.measured,
            "jobs_without_counts": share.unmeasured,
        },
    }


def _hours(seconds: float) -> float:
    return round(seconds / 3600, 4)
