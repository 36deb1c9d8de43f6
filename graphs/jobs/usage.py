"""States, node-hours and utilisation of a run's jobs, as data."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...backends.cluster.chain import DONE, FAILURES, Chain, Job, Spent, chain_file, spent
from ...backends.cluster.schedulers import Scheduler, State, Used, scheduler
from ...backends.cluster.utilization import (
    Items,
    JobTime,
    Served,
    Share,
    by_job,
    calls_of,
    levels,
    served,
    useful_share,
)
from ...backends.core.errors import FanfoldError
from ...backends.storage.journal import Source, scan
from ...backends.storage.run_folder import RunFolder, open_folder, run_ids
from ...configs.loader import peek
from ...configs.source import at_path

_SEQUENCES: Final = re.compile(r"--max-num-seqs[= ](\d+)")


def share_of(
    folder: RunFolder, hours: Sequence[Spent], batch: int | None = None, *, counts: bool = True
) -> Share:
    """Return the useful share of a run's jobs.

    A full batch is what the settings say: ``limits.endpoint_streams``, or ``--max-num-seqs`` in
    ``node.serve``; else what was seen of the servers.

    Args:
        folder: The run's folder.
        hours: The jobs.
        batch: Items that one server works on at a time; None looks for it in the settings.
        counts: Go by the servers' own counts where there are any; else by the journal alone.

    Raises:
        LedgerError: The journal cannot be read.
    """
    settings, _ = peek(folder.settings)
    instances = int(at_path(settings, ("node", "instances")) or 1)
    places = batch or at_path(settings, ("limits", "endpoint_streams"))
    places = places or _most_sequences(at_path(settings, ("node", "serve")))
    ordered = sorted(hours, key=lambda one: one.begin)
    times = [(one.begin, one.end) for one in ordered]
    told = served(servers_of(folder), times) if counts else [Served() for _ in times]
    found = by_job(calls_of(_records(folder)), times, [not one.counted for one in told])
    jobs = [_job_utilization(*each, instances) for each in zip(ordered, told, found, strict=True)]
    return useful_share(jobs, places)


def last_sign(folder: RunFolder) -> float | None:
    """Return when the run's servers or its journal were last heard of, in seconds since 1970."""
    logs, journal = servers_of(folder) / "logs", folder.journal
    files = (*logs.glob("*.jsonl"), *journal.glob("*.jsonl"))
    return max((file.stat().st_mtime for file in files), default=None)


def servers_of(folder: RunFolder) -> Path:
    """Return the folder where the nodes of a run's jobs tell of their servers."""
    return folder.path / "cluster" / "servers"


def _records(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Yield all records of the journal; servers worked also for those that were replaced."""
    run = run_ids(folder.read_provenance())
    for path in sorted(folder.journal.glob("*.jsonl")):
        yield from (line.record for line in scan(Source(path, run)))


def _job_utilization(spent: Spent, told: Served, items: Items, instances: int) -> JobTime:
    first, last = items.first, items.last
    if told.counted:
        did = tuple(tuple(one) for one in told.did.values())
        first = min((t for t in (first, told.first) if t is not None), default=None)
        last = spent.end if last is None and first is not None else last
    else:
        did = tuple(levels(calls, spent.begin, spent.end) for calls in items.calls.values())
    return JobTime(
        nodes=spent.job.nodes,
        begin=spent.begin,
        end=spent.end,
        inside_s=spent.nodes * (spent.end - spent.begin),
        before_s=spent.nodes * spent.before_s,
        servers=spent.job.nodes * instances,
        first=first,
        last=last,
        stopped=spent.job.ended is not None and spent.job.code not in (DONE, FAILURES),
        by_counts=told.counted,
        did=did,
    )


def _most_sequences(command: str | None) -> int | None:
    """Return what a command says of ``--max-num-seqs``."""
    found = _SEQUENCES.search(command or "")
    return int(found[1]) if found else None


_JOB: Final = ("SLURM_JOB_ID", "PBS_JOBID")
"""Variables that name the job in which a process runs."""


def campaign(path: Path, shares: bool = False, batch: int | None = None) -> dict[str, Any] | None:
    """Return what is known of a run's jobs as plain data, or None if it never had any.

    The scheduler is asked where it can be; else the chain's own notes stand in, and
    ``scheduler_says`` tells why.

    Args:
        path: The run folder.
        shares: Compute how busy the servers were and the useful share, which reads the whole
            journal and the nodes' records.
        batch: Items that one server works on at a time; None looks for it in the settings.

    Raises:
        LedgerError: The chain's file cannot be read.
    """
    chain = chain_file(path).read()
    if not chain.jobs:
        return None
    states, used, trouble = _asked(scheduler(chain.terms["scheduler"]), chain)
    return _facts(path, chain, states, used, shares, batch) | {"scheduler_says": trouble}


def campaign_inside(path: Path, *, shares: bool) -> dict[str, Any] | None:
    """Return the same for the report of a run's life; the scheduler is not asked.

    It may take its time to answer, which the end of a job does not have. The job in which this
    process runs counts until now.

    Raises:
        LedgerError: The chain's file cannot be read.
    """
    chain = chain_file(path).read()
    if not chain.jobs:
        return None
    here = {os.environ.get(name) for name in _JOB}
    states: dict[str, State] = {j.id: "running" for j in chain.unfinished() if j.id in here}
    return _facts(path, chain, states, {}, shares, None) | {"scheduler_says": None}


def _facts(  # noqa: PLR0913, PLR0917 - what is known, from where, and what is asked
    path: Path,
    chain: Chain,
    states: Mapping[str, State],
    used: Mapping[str, Used],
    shares: bool,
    batch: int | None,
) -> dict[str, Any]:
    folder = open_folder(path)
    sign = last_sign(folder) if any(j.began for j in chain.unfinished()) else None
    hours = spent(chain, used, states, time.time(), sign)
    facts: dict[str, Any] = {
        "site": chain.terms["site"],
        "jobs": [_job(job, states.get(job.id)) for job in chain.jobs],
        "ends": chain.halted,
        "node_hours": _hours(sum(s.node_s for s in hours)),
        "node_hours_by_scheduler": bool(hours) and all(s.by_scheduler for s in hours),
        "jobs_by_scheduler": sum(s.by_scheduler for s in hours),
        "jobs_by_fanfold": sum(not s.by_scheduler for s in hours),
    }
    return facts | _use(share_of(folder, hours, batch)) if shares else facts


def _asked(asked: Scheduler, chain: Chain) -> tuple[dict[str, State], dict[str, Used], str | None]:
    """Ask the scheduler for states and accounts; without it, say why not."""
    try:
        states = asked.states([job.id for job in chain.unfinished()])
    except FanfoldError as error:
        return {}, {}, error.message
    try:
        used = asked.used([job.id for job in chain.jobs if job.began is not None])
    except FanfoldError as error:
        return states, {}, error.message
    return states, used, None


def _job(job: Job, state: State | None) -> dict[str, Any]:
    return {
        "job": job.id,
        "state": _state(job, state),
        "nodes": job.nodes,
        "submitted": job.submitted,
        "began": job.began,
        "ended": job.ended,
        "exit_code": job.code,
        "items": job.progress if job.done is not None else None,
    }


def _state(job: Job, state: State | None) -> str:
    if job.ended is not None:
        return job.outcome or "ended"
    if job.foreign:
        return "of the run that this one was copied from"
    if state == "ended":
        return "lost" if job.began is not None else "gone before it began"
    return state or ("running?" if job.began is not None else "queued?")


def _use(share: Share) -> dict[str, Any]:
    """Return how busy the servers were, and the useful share."""
    paid = share.paid_s or 1.0
    return {
        "busy_node_hours": _hours(share.busy_s),
        "idle_node_hours": _hours(share.paid_s - share.busy_s),
        "useful": {
            "share": round(share.useful, 4),
            "full_batch_items": share.places,
            "lost": {cause: round(s / paid, 4) for cause, s in share.lost_s.items()},
            "jobs_by_servers_counts": share.by_counts,
            "jobs_by_journal": share.by_journal,
        },
    }


def _hours(seconds: float) -> float:
    return round(seconds / 3600, 4)
