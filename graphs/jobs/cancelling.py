"""The command ``cancel``: no job follows, and those that are there end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ...backends.cluster.chain import Chain, ChainFile, Job, chain_file
from ...backends.cluster.schedulers import Scheduler, State, refusal, scheduler
from ...backends.core.errors import ConfigurationError, FanfoldError, SiteError
from ...backends.storage.run_folder import open_folder
from ..saying import say

_BY_HAND: Final = {"slurm": "scancel", "pbs": "qdel"}
_NONE_FOLLOWS: Final = "no job follows; what is finished stays, and fanfold submit goes on with it"


def cancel(path: Path, at_once: bool) -> None:
    """Let no job follow, and end those that wait or run; each of them is tried.

    Args:
        path: The run folder.
        at_once: Whether running jobs are ended by the scheduler rather than asked to.

    Raises:
        ConfigurationError: No job was ever submitted, or the scheduler's commands are not here.
        SiteError: Jobs could not be ended; says which, why, and what to do.
    """
    open_folder(path)
    file = chain_file(path)
    chain = file.read()
    if others := [job.id for job in chain.jobs if job.foreign and job.ended is None]:
        names = ", ".join(others)
        say([f"{names}: jobs of the run that this folder was copied from; not cancelled"])
    if all(job.foreign for job in chain.jobs):
        raise ConfigurationError(f"{path}: no job of this run was ever submitted")
    if chain.halted is None:
        file.note("halted", why="cancelled by fanfold cancel")
    asked = scheduler(chain.terms["scheduler"])
    states = _states(asked, chain.unfinished(), path)
    did, refused = defaultdict[str, list[str]](list), dict[str, FanfoldError]()
    for job in chain.unfinished():
        outcome = _ended(asked, file, job, states[job.id], at_once)
        if isinstance(outcome, FanfoldError):
            refused[job.id] = outcome
        else:
            did[outcome].append(job.id)
    say([f"{', '.join(jobs)}: {outcome}" for outcome, jobs in did.items()])
    if refused:
        raise SiteError(_advice(path, chain, refused))
    say([_NONE_FOLLOWS])


def _states(asked: Scheduler, jobs: Sequence[Job], path: Path) -> dict[str, State]:
    """Return what the scheduler says of jobs, or what the chain's notes let expect.

    Raises:
        ConfigurationError: The scheduler's commands are not here.
    """
    try:
        return asked.states([job.id for job in jobs])
    except ConfigurationError as error:
        msg = f"{error.message}: fanfold cancel {path}\nNo job follows those that are there."
        raise ConfigurationError(msg) from None
    except SiteError as error:
        say([error.message, "each job is tried all the same"])
        return {job.id: "running" if job.began else "queued" for job in jobs}


def _ended(
    asked: Scheduler, file: ChainFile, job: Job, state: State, at_once: bool
) -> str | FanfoldError:
    """End one job; return what became of it, or why it could not be."""
    if state == "ended":
        outcome = "is gone already"
    elif state == "running" and not at_once:
        outcome = "is asked to end; items in flight are waited for (--now ends it at once)"
        return refusal(asked, job.id, asked.drain) or outcome
    else:
        if (error := refusal(asked, job.id, asked.cancel)) is not None:
            return error
        outcome = "is withdrawn" if state == "queued" else "is cancelled"
    if job.began is None and state != "running":
        before = "cancelled" if state == "queued" else "gone"
        file.note("withdrawn", job=job.id, outcome=f"{before} before it began")
    return outcome


def _advice(path: Path, chain: Chain, refused: Mapping[str, FanfoldError]) -> str:
    why = (f"job {job} could not be ended: {error.message}" for job, error in refused.items())
    by_hand = " ".join((_BY_HAND[chain.terms["scheduler"]], *refused))
    return "\n".join(
        (
            *why,
            f"try again: fanfold cancel {path}   or by hand: {by_hand}",
            "no job follows in any case: one that waits ends as it begins",
        )
    )
