"""What ``status`` and ``cost`` show of a run's jobs: the chain, its node-hours, and their use."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...backends.cluster.chain import Chain, Job, chain_file, spent
from ...backends.cluster.schedulers import Scheduler, State, Used, scheduler
from ...backends.cluster.utilization import Share
from ...backends.core.errors import FanfoldError
from ...backends.storage.run_folder import open_folder
from .useful import last_sign, share_of

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
