"""What ``status`` shows of a run's jobs: the chain, its node-hours, and their useful share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from ..backends.accounts.folder import open_folder
from ..backends.accounts.ledger import Ledger
from ..backends.cluster.chain import Chain, Job, chain_file
from ..backends.cluster.hours import Share, calls_of, spent, useful_share
from ..backends.cluster.schedulers import Scheduler, State, Used, scheduler
from ..backends.contract.errors import FanfoldError
from ..configs.load import peek
from ..configs.source import at_path

_SEQUENCES: Final = re.compile(r"--max-num-seqs[= ](\d+)")


def campaign(path: Path, shares: bool = False, batch: int | None = None) -> dict[str, Any] | None:
    """Return what is known of a run's jobs as plain data, or None if it never had any.

    The scheduler is asked where it can be; else the chain's own notes stand in, and
    ``scheduler_says`` tells why.

    Args:
        path: The run folder.
        shares: Compute the useful share, which reads the whole journal.
        batch: Items that one server works on at a time; None looks for it in the settings.

    Raises:
        LedgerError: The chain's file cannot be read.
    """
    chain = chain_file(path).read()
    if not chain.jobs:
        return None
    asked = scheduler(chain.terms["scheduler"])
    states, used, trouble = _asked(asked, chain)
    hours = spent(chain, used)
    facts: dict[str, Any] = {
        "site": chain.terms["site"],
        "jobs": [_job(job, states.get(job.id)) for job in chain.jobs],
        "ends": chain.halted,
        "node_hours": round(sum(s.node_s for s in hours) / 3600, 4),
        "node_hours_by_scheduler": bool(hours) and all(s.by_scheduler for s in hours),
        "scheduler_says": trouble,
    }
    if shares:
        facts["useful"] = _useful(share_of(path, chain, batch))
    return facts


def share_of(path: Path, chain: Chain, batch: int | None = None) -> Share:
    """Return the useful share of a run's jobs that have ended.

    A full batch is what the settings say: ``limits.endpoint_streams``, or ``--max-num-seqs`` in
    ``node.serve``; else as many items as the busiest server kept up.

    Raises:
        LedgerError: The journal cannot be read.
    """
    folder = open_folder(path)
    settings, _ = peek(folder.settings)
    servers = at_path(settings, ("node", "instances")) or 1
    places = batch or at_path(settings, ("limits", "endpoint_streams"))
    places = places or _most_sequences(at_path(settings, ("node", "serve")))
    about = folder.read_provenance()
    with Ledger(folder.journal, about["run"], about["input"]["items"]) as ledger:
        calls = calls_of(ledger.records())
    return useful_share(chain.jobs, calls, int(servers), places)


def _most_sequences(command: str | None) -> int | None:
    """Return what a command says of ``--max-num-seqs``."""
    found = _SEQUENCES.search(command or "")
    return int(found[1]) if found else None


def _asked(asked: Scheduler, chain: Chain) -> tuple[dict[str, State], dict[str, Used], str | None]:
    """Ask the scheduler for states and accounts; without it, say why not."""
    try:
        states = asked.states([job.id for job in chain.unfinished()])
        used = asked.used([job.id for job in chain.jobs if job.began is not None])
    except FanfoldError as error:
        return {}, {}, error.message
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
    if state == "ended":
        return "lost" if job.began is not None else "gone before it began"
    return state or ("running?" if job.began is not None else "queued?")


def _useful(share: Share) -> dict[str, Any]:
    paid = share.paid_s or 1.0
    return {
        "share": round(share.useful, 4),
        "full_batch_items": share.places,
        "lost": {cause: round(s / paid, 4) for cause, s in share.lost_s.items()},
    }


def show_campaign(facts: dict[str, Any], console: Console) -> None:
    """Print what :func:`campaign` returned."""
    table = Table("job", "state", "nodes", "began", "ended", "items")
    for job in facts["jobs"]:
        row = [job["job"], job["state"], job["nodes"], _time(job["began"]), _time(job["ended"])]
        items = "" if job["items"] is None else f"{job['items']:,}"
        table.add_row(*map(str, row), items)
    console.print(table)
    for line in _lines(facts):
        console.print(line, markup=False, soft_wrap=True)


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    source = "the scheduler's" if facts["node_hours_by_scheduler"] else "fanfold's own"
    yield f"site {facts['site']}; {facts['node_hours']:,.2f} node-hours by {source} times"
    if facts["scheduler_says"]:
        yield f"the scheduler was not asked: {facts['scheduler_says']}"
    if facts["ends"]:
        yield f"no further job: {facts['ends']}"
    if useful := facts.get("useful"):
        lost = ", ".join(f"{cause} {part:.1%}" for cause, part in useful["lost"].items() if part)
        yield (
            f"useful share {useful['share']:.1%} of the node-hours: a server with at least nine "
            f"tenths of {useful['full_batch_items']} items at once; the rest: {lost or 'nothing'}"
        )


def _time(text: str | None) -> str:
    return "" if text is None else text[5:16].replace("T", " ")
