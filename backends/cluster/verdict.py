"""Whether another job follows: while items remain, progress is made and the budget lasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .chain import Chain, Job

DONE, USAGE, FAILURES, BUDGET, INTERRUPTED = 0, 2, 3, 4, 5
"""Exit codes of a run that the chain knows."""

NOTHING_TO_DO: Final = 10
"""Exit code of ``chain begin``: this job has nothing to do, and none follows."""

PATIENCE: Final = 2
"""So many jobs in a row end a chain that finish no item, or lose all their model servers."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a chain goes on.

    Attributes:
        on: Whether another job follows.
        why: The reason, as a message.
    """

    on: bool
    why: str


def verdict(chain: Chain, open_items: int) -> Verdict:
    """Say whether another job should follow the jobs so far.

    Args:
        chain: The chain; the last job that began has ended or is about to.
        open_items: Items that are not finished.
    """
    if chain.halted is not None:
        return Verdict(False, chain.halted)
    if open_items == 0:
        return Verdict(False, "all items are finished")
    last = _last(chain)
    if last is not None and (why := _final(last)) is not None:
        return Verdict(False, why)
    if (idle := _without_progress(chain)) >= PATIENCE:
        lost = " or lost all their model servers" if last is not None and last.unserved else ""
        return Verdict(
            False,
            f"{idle} jobs in a row finished no item{lost}; see the logs beside the chain's file, "
            "mend it, then submit the run folder again",
        )
    if (why := _spent(chain)) is not None:
        return Verdict(False, why)
    return Verdict(True, f"{open_items:,} items remain")


def _last(chain: Chain) -> Job | None:
    return next((job for job in reversed(chain.recent) if job.began is not None), None)


def _final(job: Job) -> str | None:
    """Return why a job's exit code ends the chain, or None."""
    if job.code in (DONE, FAILURES):
        return "the run is finished"
    if job.code == USAGE:
        return f"job {job.id} ended with a wrong setting (exit code 2); its log says which"
    if job.code == BUDGET:
        return "the run's budget is spent (exit code 4)"
    return None


def _without_progress(chain: Chain) -> int:
    """Return how many of the last jobs in a row ended without an item, or without servers.

    Servers that are given up time and again cost a job each; a few items do not make up for it.
    """
    count = 0
    for job in reversed(chain.recent):
        if job.began is None or job.ended is None:
            continue
        if job.progress > 0 and not job.unserved:
            break
        count += 1
    return count


def _spent(chain: Chain) -> str | None:
    """Return which bound of the chain is reached, or None."""
    most, hours = chain.terms.get("jobs"), chain.terms.get("node_hours")
    begun = [job for job in chain.recent if job.began is not None]
    if most is not None and len(begun) >= most:
        return f"the chain has had its {most} jobs (--jobs)"
    if hours is None or not begun:
        return None
    used = sum(job.nodes * job.wall_s for job in begun) / 3600
    due = chain.recent[-1].nodes * chain.recent[-1].walltime_s / 3600
    if used + due > hours:
        return (
            f"{used:.2f} of {hours:g} node-hours are used (--node-hours), and one more job may "
            f"take {due:.2f}"
        )
    return None
