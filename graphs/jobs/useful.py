"""How well a run's jobs used their nodes: from the nodes' records, the journal and the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ...backends.cluster.chain import DONE, FAILURES, Spent
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
from ...backends.storage.journal import Source, scan
from ...backends.storage.run_folder import RunFolder, run_ids
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
    jobs = [_job(*each, instances) for each in zip(ordered, told, found, strict=True)]
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


def _job(spent: Spent, told: Served, items: Items, instances: int) -> JobTime:
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
